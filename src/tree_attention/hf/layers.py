"""The layers of a TreeCache that hold keys: spread over the ranks, or a window that is whole on each."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..errors import InputError
from .chunk import gather_in_slot_order
from .cursor import any_length
from .placement import Placement


class ShardedLayer(CacheLayerMixin):
    """Full attention: holds slots `layout.slots(0, length, rank)`, in buffers `[B, H_kv, capacity, D]` that grow."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    keys: Any  # Tensor, or None before the first update
    values: Any

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.length = 0  # slots over all ranks
        self.fed = 0  # slots over all ranks that the last update brought

    @property
    def held(self) -> int:
        """Slots on this rank."""
        return self.placement.layout.local_length(self.length, self.placement.rank)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (_resized(t[:, :, :0], 1) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what this rank owns of the new tokens; returns all it holds, or one unused key if that is nothing.

        (Models that reshape what they get, such as DeepSeek's, cannot take a tensor without elements; the attention
        function cuts it to `held`.)
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.placement.is_stepping:
            return self._step(key_states, value_states)
        placement, before, old = self.placement, self.length, self.held
        chunk = placement.chunk
        fed = key_states.shape[2] if chunk is None else chunk[1] - chunk[0]
        placement.check_room(before + fed)
        placement.moved = True
        held = placement.layout.local_length(before + fed, placement.rank)
        if held > old:
            self.grow(held)
            if held - old < key_states.shape[2]:
                mine = placement.layout.slots(before, before + fed, placement.rank, device=key_states.device) - before
                key_states, value_states = key_states[:, :, mine], value_states[:, :, mine]
            self.keys[:, :, old:held] = key_states
            self.values[:, :, old:held] = value_states
        self.count(fed)  # last: a layer that finds no memory has read nothing
        shown = max(self.held, 1)
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keep one new token where the cursor says; returns the whole buffers."""
        cursor = self.placement.stepping_cursor
        self.keys.index_copy_(2, cursor.place, key_states)
        self.values.index_copy_(2, cursor.place, value_states)
        return self.keys[:, :, :-1], self.values[:, :, :-1]

    def count(self, fed: int) -> None:
        self.fed, self.length = fed, self.length + fed

    def grow(self, needed: int) -> None:
        """Room for `needed` slots: all of a static cache, what was reserved, or a 64th (at least 64) more."""
        placement = self.placement
        static = placement.max_tokens is not None
        if needed > self.keys.shape[2] - static:
            reserved = placement.layout.local_length(placement.reserved, placement.rank)
            capacity = reserved if reserved >= needed else needed + max(64, needed // 64)
            if static:
                capacity = placement.capacity + 1
            self.keys, self.values = _resized(self.keys, capacity), _resized(self.values, capacity)
            if static:
                self.keys, self.values = any_length(self.keys, 2), any_length(self.values, 2)
            placement.version += 1

    def get_seq_length(self) -> Any:
        """Slots so far; within a step a tensor, for whoever wants to calculate with it."""
        return self.placement.stepping_cursor.slot[0] if self.placement.is_stepping else self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.placement.is_stepping:  # read by nobody: the mask is a rule
            return self.keys.shape[2], 0
        chunk = self.placement.chunk
        return (self.length + query_length if chunk is None else chunk[1]), 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.length, self.fed = False, 0, 0
        self.placement.moved = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self.length = max(self.length + tokens_to_remove, 0)
        self.placement.moved = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.batch_select_indices(beam_idx.to(self.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._replace(self.keys[indices], self.values[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._replace(*(t.repeat_interleave(repeats, 0) for t in (self.keys, self.values)))

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        """In the same memory, if the batch is as large as it was."""
        if keys.shape == self.keys.shape:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
            self.placement.version += 1


class ReplicatedWindowLayer(DynamicSlidingWindowLayer):
    """Sliding-window or chunked attention: the window is whole on every rank.

    Between decode steps without the host the window is a ring, buffers in which slot s lies at `s % sliding_window`.
    """

    def __init__(self, placement: Placement, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.placement = placement
        self.length = 0  # as in ShardedLayer
        self.fed = 0
        self.ring: list[Tensor] = []
        self.is_ring = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As its base, after gathering what the other ranks were fed; returns the window and the new tokens."""
        if self.placement.is_stepping:
            return self._step(key_states, value_states)
        self.from_ring()
        if self.placement.chunk is not None and self.placement.group is not None:
            mine = torch.cat([key_states, value_states], -1)
            gathered = gather_in_slot_order(mine, self.placement.group, self.placement.layout.block)
            key_states, value_states = gathered.split([key_states.shape[3], value_states.shape[3]], -1)
            self.placement.received_bytes += gathered.nbytes - mine.nbytes
        self.fed = key_states.shape[2]
        self.placement.moved = True
        self.cumulative_length = self.length  # its base counts before it finds memory
        result = super().update(key_states, value_states, *args, **kwargs)
        self.length = self.cumulative_length
        return result

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        place = self.placement.stepping_cursor.slot % self.sliding_window
        for buffer, new in zip(self.ring, (key_states, value_states), strict=True):
            buffer.index_copy_(2, place, new)
        return self.ring[0], self.ring[1]

    def count(self, fed: int) -> None:
        self.fed, self.length = fed, self.length + fed
        self.cumulative_length = self.length

    def get_seq_length(self) -> Any:
        """As in ShardedLayer."""
        return self.placement.stepping_cursor.slot[0] if self.placement.is_stepping else self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.sliding_window, 0) if self.placement.is_stepping else super().get_mask_sizes(query_length)

    def to_ring(self) -> None:
        if self.is_ring:
            return
        windows: list[Any] = [self.keys, self.values]
        shapes = [(*t.shape[:2], self.sliding_window, t.shape[3]) for t in windows]
        if [tuple(t.shape) for t in self.ring] != shapes:
            self.ring = [t.new_zeros(shape) for t, shape in zip(windows, shapes, strict=True)]
            self.placement.version += 1
        for buffer, window in zip(self.ring, windows, strict=True):
            buffer.index_copy_(2, self._places(window.shape[2]), window)
        self.is_ring = True

    def from_ring(self) -> None:
        """The window as its base keeps it: the last `sliding_window - 1` tokens in order."""
        if self.is_ring:
            places = self._places(min(self.length, self.sliding_window - 1))
            self.keys, self.values = (t[:, :, places] for t in self.ring)
            self.is_ring = False
            self.placement.moved = True

    def _places(self, count: int) -> Tensor:
        """Of the last `count` tokens."""
        return torch.arange(self.length - count, self.length, device=self.device) % self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        self.from_ring()
        super().crop(tokens_to_remove)
        self.length = self.cumulative_length
        self.placement.moved = True

    def reorder_cache(self, beam_idx: Any) -> None:
        self.from_ring()
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.from_ring()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.from_ring()
        super().batch_repeat_interleave(repeats)

    def reset(self) -> None:
        """Drop the window (transformers 5.17 would keep it, zeroed)."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length, self.length, self.fed = False, 0, 0, 0
        self.is_ring, self.placement.moved = False, True


def _resized(buffer: Tensor, capacity: int) -> Tensor:
    """A larger buffer with the same beginning."""
    resized = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[3]))
    resized[:, :, : buffer.shape[2]] = buffer
    return resized
