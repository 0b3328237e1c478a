"""Where a static TreeCache stands, on the device: what a decode step needs, so that nothing in it asks the host.

A captured step is replayed with other numbers in the same memory. So the newest token's slot, its place in this rank's
buffers and the number of keys held are tensors, which the step itself moves on.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..layout import Layout
from .mask import LazyMask


class Cursor:
    """slot, place: int64 `[1]`, of the newest token. held: int32 `[B]`, keys on this rank. key_slots: `[capacity]`.

    place is `capacity` where another rank keeps the token: buffers have one more place, which is never read.
    """

    def __init__(self, layout: Layout, rank: int, capacity: int, batch: int, device: torch.device) -> None:
        self.layout, self.rank = layout, rank
        self.nowhere = torch.tensor(capacity, device=device)
        self.slot, self.place = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.held = torch.zeros(batch, dtype=torch.int32, device=device)
        self.key_slots = any_length(layout.slot(torch.arange(capacity, device=device), rank), 0)
        self.padding: Tensor | None = None
        self._masks: dict[tuple[int, int], Tensor] = {}

    def start(self, length: int, padding: Tensor | None, most_tokens: int) -> None:
        """Stand behind `length` tokens. padding: bool `[B, some slots]`, True for real tokens; later ones are real."""
        self.slot.fill_(length - 1)
        if padding is None:
            self.padding = None
            return
        if self.padding is None:
            padded = torch.empty((len(padding), most_tokens), dtype=torch.bool, device=self.slot.device)
            self.padding = any_length(padded, 1)
        self.padding.fill_(True)
        self.padding[:, : padding.shape[1]] = padding[:, :most_tokens]

    def advance(self) -> None:
        """On to the next token; part of the captured step."""
        if not torch.compiler.is_compiling():
            self._masks.clear()
        self.slot.add_(1)
        mine = self.layout.owner(self.slot) == self.rank
        self.place.copy_(torch.where(mine, self.layout.local_index(self.slot), self.nowhere))
        self.held.copy_(self.layout.local_length(self.slot + 1, self.rank).expand_as(self.held))

    def ring_slots(self, size: int) -> Tensor:
        """int64 `[size]`: the slot at each place of a ring that keeps slot s at `s % size`; negative: none yet."""
        return self.slot - (self.slot - torch.arange(size, device=self.slot.device)) % size

    def mask_of_shard(self, mask: LazyMask) -> Tensor | None:
        """bool `[B or 1, 1, 1, capacity]`: which of this rank's keys the newest token sees; None: all that are held."""
        if mask.rule is causal_mask_function and self.padding is None:
            return None
        return self._build(mask, self.key_slots, 0)

    def mask_of_ring(self, mask: LazyMask, size: int) -> Tensor:
        """The same over a ring `[B or 1, 1, 1, size]`."""
        return self._build(mask, self.ring_slots(size), size)

    def _build(self, mask: LazyMask, key_slots: Tensor, size: int) -> Tensor:
        """Once a step for all layers of a kind, which share a mask; a compiler sees that by itself."""
        known = (id(mask), size)
        if torch.compiler.is_compiling():
            return self._built(mask, key_slots)
        if known not in self._masks:
            self._masks[known] = self._built(mask, key_slots)
        return self._masks[known]

    def _built(self, mask: LazyMask, key_slots: Tensor) -> Tensor:
        built = replace(mask, padding=self.padding).build(self.slot, key_slots, len(self.held))
        return built & (key_slots >= 0)


def any_length(tensor: Tensor, dim: int) -> Tensor:
    """The same tensor; torch.compile is not to make a graph for its length alone, which is that of one cache."""
    torch._dynamo.mark_dynamic(tensor, dim)
    return tensor
