"""A case of `bench decode`: how large it is, its inputs, and what must come out."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..partial import merge, stack
from ..reduce.collectives import all_gather
from ..testing import oracle

ROTATED_BYTES, MOST_BYTES = 530e6, 60e9  # of all sets: 400 MB more than the largest L2, 126 MB; and room on the device
CALLS, CALLS_BYTES = 24, 24e9  # calls of one turn, unless they read more than that
REFERENCE_ELEMENTS = 1 << 25  # of K that the reference takes at once


@dataclass(frozen=True)
class Case:
    """q `[batch, 1, heads, head_dim]` over `keys` keys a rank, bfloat16; ragged: lengths between 1 and `keys`."""

    batch: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    layout: str
    ragged: bool

    def lengths(self) -> Tensor | None:
        """int32 `[batch]`, the same draw on every rank, or None."""
        drawn = torch.randint(1, self.keys + 1, (self.batch,), generator=torch.Generator().manual_seed(0))
        return drawn.int() if self.ragged else None

    def allocated_bytes(self) -> int:
        """Of K and V on a rank."""
        return 2 * self.batch * self.keys * self.kv_heads * self.head_dim * 2

    def read_bytes(self) -> int:
        """Of the keys and values that count."""
        lengths = self.lengths()
        held = self.batch * self.keys if lengths is None else int(lengths.sum())
        return 2 * held * self.kv_heads * self.head_dim * 2

    def sets(self) -> int:
        """How many K and V are rotated, so that no cache holds them between calls: 2 to 10, as MOST_BYTES allows."""
        wanted = min(math.ceil(ROTATED_BYTES / self.read_bytes()), 10, int(MOST_BYTES // self.allocated_bytes()))
        return max(wanted, 2)

    def calls(self) -> int:
        """Calls of a turn: every set as often as every other, and at least twice."""
        sets = self.sets()
        return sets * max(2, math.ceil(min(CALLS, CALLS_BYTES / self.read_bytes()) / sets))


def make_inputs(case: Case, rank: int, size: int, device: torch.device) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """q, the same on every rank; lengths; and this rank's sets, each `[2, ...]`: K, then V, in the case's layout.

    Normal numbers, and in the first set, the one that is compared, one heavy key for each query head, on one rank only:
    on white noise the ranks' lse are so alike that even a merge that ignores them would pass.
    """
    q = torch.randn(case.batch, 1, case.heads, case.head_dim, generator=torch.Generator().manual_seed(1))
    q = q.to(device, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(2 + rank)
    inner = (case.keys, case.kv_heads) if case.layout == "NHD" else (case.kv_heads, case.keys)
    shape = (2, case.batch, *inner, case.head_dim)
    how: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    sets = [torch.randn(shape, **how) for _ in range(case.sets())]
    lengths = case.lengths()
    held = torch.full((case.batch,), case.keys) if lengths is None else lengths
    batch, head = torch.meshgrid(torch.arange(case.batch), torch.arange(rank, case.heads, size), indexing="ij")
    key = (torch.rand(batch.shape, generator=torch.Generator().manual_seed(3)) * held[:, None]).long()
    factor = (math.log(case.keys) + 1) / case.head_dim**0.5  # about as much weight as all others together
    keys = keys_and_values(case, sets[0])[0]
    keys[batch, key, head // (case.heads // case.kv_heads)] += factor * q[batch, 0, head]
    return q, None if lengths is None else lengths.to(device), sets


def keys_and_values(case: Case, kv: Tensor) -> tuple[Tensor, Tensor]:
    """k and v `[B, S_local, H_kv, D]`, views of one set."""
    k, v = kv if case.layout == "NHD" else kv.transpose(2, 3)
    return k, v


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Attention `[B, 1, H, D]` in float64, over this rank's keys and over all ranks'; some keys at a time."""
    B, S, H_kv, D = k.shape
    total, step = None, max(REFERENCE_ELEMENTS // (B * H_kv * D), 1)
    for first in range(0, S, step):
        keys, values = k[:, first : first + step], v[:, first : first + step]
        held = None if lengths is None else (lengths - first).clamp(0, keys.shape[1])
        part = oracle(q, keys, values, local_seqlens=held)
        total = part if total is None else merge(stack([total, part]))
    assert total is not None, "a case has keys"
    return total.out, all_gather(total, group).out
