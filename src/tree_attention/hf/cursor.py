"""`StepState`: the decode steps of a static TreeCache. `Cursor`: its position, as tensors that a step advances."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from .exchange import CacheRanks
from .mask import LazyMask

MAX_STEP_TOKENS = 16  # per row; more are fed like a prompt
stepping_layers: list[list[Any]] = []  # the layers of each TreeCache inside `stepping`


class StepState:
    """The state of decode steps that a cache shares with its layers. Only the methods of this class change it."""

    def __init__(self, ranks: CacheRanks) -> None:
        self.ranks = ranks
        self.cursor: Any = None  # a Cursor from the first step on
        self.is_stepping = False  # True during a step's forward pass: layers and attention then use the cursor
        self.cursor_is_stale = True  # the host has changed the cache since the cursor was set
        self.buffers_version = 0  # increases when buffers move; graphs that were captured before are not replayed

    def needs_cursor(self, batch: int) -> bool:
        """True if the cursor must be set before a step of `batch` rows."""
        return self.cursor_is_stale or self.cursor is None or self.cursor.batch != batch

    @torch.inference_mode(False)  # its tensors are written to in every step, in inference mode or not
    def set_cursor(self, length: int, batch: int, device: torch.device, padding: Tensor | None) -> None:
        """Set the cursor behind the first `length` tokens. padding: see `Cursor.start`."""
        if self.cursor is None or self.cursor.batch != batch:
            self.cursor = Cursor(self.ranks, batch, device)
            self.buffers_changed()
        self.cursor.start(length, padding)
        self.cursor_is_stale = False

    @contextlib.contextmanager
    def stepping(self, layers: list[Any], tokens: int) -> Iterator[None]:
        """A step's forward pass through the layers of the cache. The cursor advances by `tokens` tokens."""
        stepping_layers.append(layers)
        self.is_stepping = True
        try:
            self.cursor.advance(tokens)
            yield
        finally:
            self.is_stepping = False
            stepping_layers.remove(layers)

    def move_cursor(self, length: int) -> None:
        """Set the cursor behind the first `length` tokens again, which it has passed. Does not wait for the device."""
        if not self.cursor_is_stale:
            self.cursor.last.fill_(length - 1)

    def invalidate_cursor(self) -> None:
        self.cursor_is_stale = True

    def buffers_changed(self) -> None:
        self.buffers_version += 1


class Cursor:
    """The positions of a step's tokens, on the device.

    A token of another rank has the place `capacity`: buffers have one extra place, which is never read.

    Attributes:
        last: int64 `[1]`, the newest token's slot.
        slots, places: int64 `[T]`, of the step's tokens over all ranks, and in this rank's buffers.
        held: int32 `[B]`, or `[B, T]` if T > 1: number of keys on this rank up to each token.
    """

    def __init__(self, ranks: CacheRanks, batch: int, device: torch.device) -> None:
        capacity = ranks.static_capacity
        self.ranks, self.batch = ranks, batch
        self.nowhere = torch.tensor(capacity, device=device)
        self.last = torch.zeros(1, dtype=torch.long, device=device)
        most, here = MAX_STEP_TOKENS, {"device": device}
        self._ahead = torch.arange(most, **here)
        self._memory = [torch.zeros(most, dtype=torch.long, **here) for _ in range(2)]
        self._held = torch.zeros(batch * most, dtype=torch.int32, **here)
        self._take(1)
        self.key_slots = any_length(ranks.layout.slot(torch.arange(capacity, device=device), ranks.rank), 0)
        self.padding: Tensor | None = None  # bool `[B, max_tokens]`, True for real tokens
        self._masks: dict[tuple[int, int], Tensor] = {}

    def start(self, length: int, padding: Tensor | None) -> None:
        """Move behind the first `length` tokens. padding: bool `[B, n]`, True for real tokens, as are tokens from n."""
        self.last.fill_(length - 1)
        if padding is None:
            self.padding = None
            return
        if self.padding is None:
            padded = torch.empty((len(padding), self.ranks.max_tokens or 0), dtype=torch.bool, device=self.last.device)
            self.padding = any_length(padded, 1)
        self.padding.fill_(True)
        self.padding[:, : padding.shape[1]] = padding[:, : self.padding.shape[1]]

    def _take(self, tokens: int) -> None:
        """Use the memory for a step of `tokens` tokens: the same in each such step, since graphs hold its address."""
        self.slots, self.places = (memory[:tokens] for memory in self._memory)
        held = self._held[: self.batch * tokens]
        self.held = held if tokens == 1 else held.view(self.batch, tokens)

    def advance(self, tokens: int) -> None:
        """Move to the next tokens; part of the captured step."""
        if not torch.compiler.is_compiling():
            self._masks.clear()
        self._take(tokens)
        layout, rank = self.ranks.layout, self.ranks.rank
        torch.add(self.last + 1, self._ahead[:tokens], out=self.slots)
        mine = layout.owner(self.slots) == rank
        self.places.copy_(torch.where(mine, layout.local_index(self.slots), self.nowhere))
        self.held.copy_(layout.local_length(self.slots + 1, rank).expand_as(self.held))
        self.last.add_(tokens)

    def mask_of_shard(self, mask: LazyMask) -> Tensor | None:
        """bool `[B or 1, 1, T, capacity]`: this rank's keys that each token may see; None: all that are held."""
        if mask.rule is causal_mask_function and self.padding is None:
            return None
        return self._mask(mask, self.key_slots, 0)

    def mask_of_ring(self, mask: LazyMask, size: int) -> Tensor:
        """bool `[B or 1, 1, T, size]`: the keys that each token may see, of a ring with slot s at `s % size`."""
        key_slots = self.last - (self.last - torch.arange(size, device=self.last.device)) % size  # negative if empty
        return self._mask(mask, key_slots, size)

    def _mask(self, mask: LazyMask, key_slots: Tensor, size: int) -> Tensor:
        """Build each mask once per step for all layers that share it; a compiler merges equal ones itself."""
        known = None if torch.compiler.is_compiling() else self._masks.get((id(mask), size))
        if known is not None:
            return known
        built = replace(mask, padding=self.padding).build(self.slots, key_slots, self.batch) & (key_slots >= 0)
        if not torch.compiler.is_compiling():
            self._masks[id(mask), size] = built
        return built


def any_length(tensor: Tensor, dim: int) -> Tensor:
    """Return `tensor`, marked so that torch.compile makes one graph for all lengths of `dim`."""
    torch._dynamo.mark_dynamic(tensor, dim)
    return tensor
