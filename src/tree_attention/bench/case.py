"""A case of `bench decode`: its sizes, its inputs and its exact result."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..partial import merge, stack
from ..reduce.collectives import all_gather
from ..testing import oracle

ROTATED_BYTES = 530e6  # of all sets together: 400 MB more than the largest L2 cache (126 MB)
MAX_BYTES = 60e9  # of all sets together: must fit on the device
CALLS, CALLS_BYTES = 24, 24e9  # calls per round; fewer if they would read more than CALLS_BYTES
REFERENCE_ELEMENTS = 1 << 25  # of K per step of `exact_attention`
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """q `[batch, 1, heads, head_dim]` over `keys` keys per rank, bfloat16. ragged: lengths between 1 and `keys`."""

    batch: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    layout: str
    ragged: bool

    def lengths(self) -> Tensor | None:
        """Random lengths, int32 `[batch]`, the same on every rank. None if not ragged."""
        drawn = torch.randint(1, self.keys + 1, (self.batch,), generator=torch.Generator().manual_seed(0))
        return drawn.int() if self.ragged else None

    def allocated_bytes(self) -> int:
        """Bytes of one set of K and V on a rank."""
        return 2 * self.batch * self.keys * self.kv_heads * self.head_dim * 2

    def read_bytes(self) -> int:
        """Bytes of the keys and values within the lengths."""
        lengths = self.lengths()
        held = self.batch * self.keys if lengths is None else int(lengths.sum())
        return 2 * held * self.kv_heads * self.head_dim * 2

    def sets(self) -> int:
        """Number of K and V sets, 2 to 10, used in rotation so that no cache holds them between calls."""
        wanted = min(math.ceil(ROTATED_BYTES / self.read_bytes()), 10, int(MAX_BYTES // self.allocated_bytes()))
        return max(wanted, 2)

    def calls(self) -> int:
        """Number of calls per round: each set equally often, at least twice."""
        sets = self.sets()
        return sets * max(2, math.ceil(min(CALLS, CALLS_BYTES / self.read_bytes()) / sets))


def make_inputs(case: Case, rank: int, size: int, device: torch.device) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return q, the same on every rank; the lengths; this rank's sets, each `[2, ...]`: K and V in the case's layout.

    All numbers are normally distributed. In the first set, which is compared, each query head has one heavy key, on one
    rank only: on white noise the lse of all ranks are so similar that even a merge that ignores them would pass.
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
    factor = (math.log(case.keys) + 1) / case.head_dim**0.5  # about the weight of all other keys together
    keys = keys_and_values(case, sets[0])[0]
    keys[batch, key, head // (case.heads // case.kv_heads)] += factor * q[batch, 0, head]
    return q, None if lengths is None else lengths.to(device), sets


def keys_and_values(case: Case, kv: Tensor) -> Pair:
    """Return k and v `[B, S_local, H_kv, D]`, views of one set."""
    k, v = kv if case.layout == "NHD" else kv.transpose(2, 3)
    return k, v


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, group: ProcessGroup) -> Pair:
    """Return attention `[B, 1, H, D]` in float64, over this rank's keys and over all keys, computed in chunks."""
    B, S, H_kv, D = k.shape
    total, step = None, max(REFERENCE_ELEMENTS // (B * H_kv * D), 1)
    for first in range(0, S, step):
        keys, values = k[:, first : first + step], v[:, first : first + step]
        held = None if lengths is None else (lengths - first).clamp(0, keys.shape[1])
        part = oracle(q, keys, values, local_seqlens=held)
        total = part if total is None else merge(stack([total, part]))
    assert total is not None, "a case has keys"
    return total.out, all_gather(total, group).out
