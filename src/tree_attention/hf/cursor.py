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
    def stepping(self, layers: list[Any]) -> Iterator[None]:
        """A step's forward pass through the layers of the cache. The cursor advances by one token."""
        stepping_layers.append(layers)
        self.is_stepping = True
        try:
            self.cursor.advance()
            yield
        finally:
            self.is_stepping = False
            stepping_layers.remove(layers)

    def invalidate_cursor(self) -> None:
        self.cursor_is_stale = True

    def buffers_changed(self) -> None:
        self.buffers_version += 1


class Cursor:
    """The newest token's position, on the device.

    A token of another rank has the place `capacity`: buffers have one extra place, which is never read.
    """

    def __init__(self, ranks: CacheRanks, batch: int, device: torch.device) -> None:
        capacity = ranks.static_capacity
        self.ranks, self.batch = ranks, batch
        self.nowhere = torch.tensor(capacity, device=device)
        self.slot, self.place = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.held = torch.zeros(batch, dtype=torch.int32, device=device)  # number of keys on this rank
        self.key_slots = any_length(ranks.layout.slot(torch.arange(capacity, device=device), ranks.rank), 0)
        self.padding: Tensor | None = None  # bool `[B, max_tokens]`, True for real tokens
        self._masks: dict[tuple[int, int], Tensor] = {}

    def start(self, length: int, padding: Tensor | None) -> None:
        """Move behind the first `length` tokens. padding: bool `[B, n]`, True for real tokens, as are tokens from n."""
        self.slot.fill_(length - 1)
        if padding is None:
            self.padding = None
            return
        if self.padding is None:
            padded = torch.empty((len(padding), self.ranks.max_tokens or 0), dtype=torch.bool, device=self.slot.device)
            self.padding = any_length(padded, 1)
        self.padding.fill_(True)
        self.padding[:, : padding.shape[1]] = padding[:, : self.padding.shape[1]]

    def advance(self) -> None:
        """Move to the next token; part of the captured step."""
        if not torch.compiler.is_compiling():
            self._masks.clear()
        layout, rank = self.ranks.layout, self.ranks.rank
        self.slot.add_(1)
        mine = layout.owner(self.slot) == rank
        self.place.copy_(torch.where(mine, layout.local_index(self.slot), self.nowhere))
        self.held.copy_(layout.local_length(self.slot + 1, rank).expand_as(self.held))

    def mask_of_shard(self, mask: LazyMask) -> Tensor | None:
        """bool `[B or 1, 1, 1, capacity]`: this rank's keys that the newest token may see; None: all that are held."""
        if mask.rule is causal_mask_function and self.padding is None:
            return None
        return self._mask(mask, self.key_slots, 0)

    def mask_of_ring(self, mask: LazyMask, size: int) -> Tensor:
        """bool `[B or 1, 1, 1, size]`: the keys that the newest token may see, of a ring with slot s at `s % size`."""
        key_slots = self.slot - (self.slot - torch.arange(size, device=self.slot.device)) % size  # negative if empty
        return self._mask(mask, key_slots, size)

    def _mask(self, mask: LazyMask, key_slots: Tensor, size: int) -> Tensor:
        """Build each mask once per step for all layers that share it; a compiler merges equal ones itself."""
        known = None if torch.compiler.is_compiling() else self._masks.get((id(mask), size))
        if known is not None:
            return known
        built = replace(mask, padding=self.padding).build(self.slot, key_slots, self.batch) & (key_slots >= 0)
        if not torch.compiler.is_compiling():
            self._masks[id(mask), size] = built
        return built


def any_length(tensor: Tensor, dim: int) -> Tensor:
    """Return `tensor`, marked so that torch.compile makes one graph for all lengths of `dim`."""
    torch._dynamo.mark_dynamic(tensor, dim)
    return tensor
