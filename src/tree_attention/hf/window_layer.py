"""`ReplicatedWindowLayer`: a layer of a TreeCache with a window, which is whole on every rank."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..reduce.collectives import gather
from .cursor import MAX_STEP_TOKENS
from .layers import KeyLayer, fitted


class ReplicatedWindowLayer(KeyLayer, DynamicSlidingWindowLayer):
    """Sliding-window or chunked attention. Between steps the window is a ring: slot s lies at `s % size`.

    It has room for the tokens of a step beside a window, so that tokens can be taken back.
    """

    def __init__(self, *shared: Any, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(*shared, sliding_window=sliding_window, **kwargs)
        self.ring: list[Tensor] = []
        self.is_ring = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Gather a chunk's keys from all ranks, then update the window; return the window and the new tokens."""
        if self.step_state.is_stepping:
            places = self.step_state.cursor.slots % self.ring[0].shape[2]
            for buffer, new in zip(self.ring, (key_states, value_states), strict=True):
                buffer.index_copy_(2, places, fitted(new, buffer))
            return self.ring[0], self.ring[1]
        self.from_ring()
        if self.chunk is not None and self.ranks.group is not None:
            mine = torch.cat([key_states, value_states], -1)
            by_rank = gather(mine, self.ranks.group).unflatten(3, (-1, self.ranks.layout.block))
            gathered = by_rank.permute(1, 2, 3, 0, 4, 5).flatten(2, 4)  # [P, B, H, cycles, block, D] -> slot order
            key_states, value_states = gathered.split([key_states.shape[3], value_states.shape[3]], -1)
            self.exchange.count(gathered.nbytes - mine.nbytes)
        self.step_state.invalidate_cursor()
        self.cumulative_length = self.length  # the base class counts before it allocates, which may fail
        result = super().update(key_states, value_states, *args, **kwargs)
        super().count(key_states.shape[2])
        return result

    def count(self, tokens: int) -> None:
        super().count(tokens)
        self.cumulative_length = self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.step_state.is_stepping:
            return self.sizes_in_step()
        tokens = query_length if self.chunk is None else self.chunk[1] - self.chunk[0]
        return super().get_mask_sizes(tokens)

    def begin_steps(self) -> None:
        """Turn the window into a ring."""
        if self.is_ring:
            return
        windows: list[Any] = [self.keys, self.values]
        shapes = [(*t.shape[:2], self.sliding_window + MAX_STEP_TOKENS, t.shape[3]) for t in windows]
        if [(t.shape, t.dtype) for t in self.ring] != [(s, t.dtype) for s, t in zip(shapes, windows, strict=True)]:
            with torch.inference_mode(False):  # as in `layers._resized`
                self.ring = [t.new_zeros(shape) for t, shape in zip(windows, shapes, strict=True)]
            self.step_state.buffers_changed()
        for buffer, window in zip(self.ring, windows, strict=True):
            buffer.index_copy_(2, self._places(window.shape[2]), window)
        self.is_ring = True

    def from_ring(self) -> None:
        """Turn the ring into the window of the base class: the last `sliding_window - 1` tokens in order."""
        if self.is_ring:
            places = self._places(min(self.length, self.sliding_window - 1))
            self.keys, self.values = (t[:, :, places] for t in self.ring)
            self.is_ring = False
            self.step_state.invalidate_cursor()

    def _places(self, count: int) -> Tensor:
        """The places of the last `count` tokens in the ring."""
        return torch.arange(self.length - count, self.length, device=self.device) % self.ring[0].shape[2]

    def can_take_back(self) -> bool:
        """True between steps: the keys that a step replaced in the ring are outside of all later windows."""
        return self.is_ring

    def take_back(self, tokens: int) -> None:
        assert self.is_ring, "the last tokens were not fed by a step"
        super().take_back(tokens)
        self.cumulative_length = self.length

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.from_ring()
        tensors = {"keys": self.keys, "values": self.values} if self.keys is not None else {}
        return tensors, {"length": self.length}

    def import_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        self.reset()
        if tensors:
            self.lazy_initialization(tensors["keys"], tensors["values"])
            self.keys, self.values = tensors["keys"].clone(), tensors["values"].clone()
        self.count(plain["length"])

    def undo_point(self) -> Callable[[], None]:
        # An update replaces a window, so the exported tensors keep their values.
        return functools.partial(self.import_state, *self.export_state())

    def crop(self, tokens_to_remove: int) -> None:
        self.from_ring()
        super().crop(tokens_to_remove)
        self._set_length(self.cumulative_length)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.from_ring()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.from_ring()
        super().batch_repeat_interleave(repeats)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length, self.is_ring = 0, False
