"""Which rank holds which token: block-cyclic over the slots of the cache.

Slot `s` is the s-th token of the context, counted over all ranks, padding included. Blocks of `block` consecutive
slots are assigned to the ranks round-robin. The rule needs no state and no maximum length. It balances prefill, decode
and many turns: after any number of tokens, two ranks differ by at most one block.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import InputError

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class Layout:
    """Block-cyclic layout over `world_size` ranks in blocks of `block` slots.

    Slots and local indices are ints or integer tensors, counted from 0.
    """

    world_size: int
    block: int

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.block < 1:
            raise InputError(f"world_size and block must be at least 1, got {self.world_size} and {self.block}")

    @property
    def cycle(self) -> int:
        """Number of slots after which the pattern repeats; each rank holds `block` of them."""
        return self.world_size * self.block

    def owner(self, slot: Index) -> Index:
        """Return the rank that holds `slot`."""
        return slot // self.block % self.world_size

    def local_index(self, slot: Index) -> Index:
        """Return the index of `slot` among the slots of its owner."""
        return slot // self.cycle * self.block + slot % self.block

    def slot(self, local_index: Index, rank: int) -> Index:
        """Return the slot that `rank` holds at `local_index`; the inverse of (`owner`, `local_index`)."""
        return local_index // self.block * self.cycle + rank * self.block + local_index % self.block

    def local_length(self, length: Index, rank: int) -> Index:
        """Return how many of the slots `0 .. length - 1` `rank` holds."""
        rest = length % self.cycle - rank * self.block
        rest = rest.clamp(0, self.block) if isinstance(rest, Tensor) else min(max(rest, 0), self.block)
        return length // self.cycle * self.block + rest  # pyrefly: ignore[bad-return]

    def slots(self, start: int, stop: int, rank: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Return the slots in `start .. stop - 1` that `rank` holds, ascending: int64, possibly empty."""
        local = torch.arange(self.local_length(start, rank), self.local_length(stop, rank), device=device)
        return self.slot(local, rank)
