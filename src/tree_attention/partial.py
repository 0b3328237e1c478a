"""`Partial`, the only type between the stages, and its merge.

For a set of keys `A` with scaled scores `s_a` and values `v_a`, put

    Z(A) = sum_a exp(s_a)          lse(A) = log Z(A)          out(A) = sum_a exp(s_a) v_a / Z(A)

The attention over `A ∪ B` follows from the two pairs alone:

    Z(A ∪ B) = Z(A) + Z(B)         out(A ∪ B) = (Z(A) out(A) + Z(B) out(B)) / (Z(A) + Z(B))

So `(out, lse)` is the pair `(Z out, Z)` under addition, written in another coordinate: the merge is associative and
commutative, with the empty set, `out = 0, lse = -inf`, as its identity. That is all that a tree reduction needs.
docs/math.md derives the same from the energy function.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over a subset of the keys.

    out: `[B, T, H, D_v]` float32 (float64 from float64 inputs); 0 where the subset is empty.
    lse: `[B, T, H]`, same dtype; natural logarithm of the sum of exp(scaled score); -inf where the subset is empty.
    """

    out: Tensor
    lse: Tensor


class PartialSpec(NamedTuple):
    """Shape `[B, T, H, D_v]` of `out`, dtype and device of a Partial that may not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def rows(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def nbytes(self) -> int:
        return self.rows() * (self.shape[3] + 1) * self.dtype.itemsize


def spec_of(partial: Partial) -> PartialSpec:
    return PartialSpec(tuple(partial.out.shape), partial.out.dtype, partial.out.device)


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the Partial that inputs of `dtype` give."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(parts: Partial) -> Partial:
    """Merge the leading dim: out `[N, ...]`, lse `[N, ...]` are N partials over disjoint sets of keys.

    With `m = max_n lse_n` and `w_n = exp(lse_n - m)`, out = sum_n w_n out_n / sum_n w_n and lse = m + log sum_n w_n.
    Parts without keys weigh nothing; if no part has a key the result is `(0, -inf)`. No epsilon is needed: the largest
    weight is exactly 1. The sum runs in the order of the leading dim, so equal inputs give equal bits.
    """
    shift = parts.lse.amax(0).clamp_min(torch.finfo(parts.lse.dtype).min)  # finite: -inf - -inf would be NaN
    weight = (parts.lse - shift).exp()
    total = weight.sum(0)
    out = (weight.unsqueeze(-1) * parts.out).sum(0) / total.clamp_min(1.0).unsqueeze(-1)
    return Partial(out, total.log() + shift)


def stack(parts: Sequence[Partial]) -> Partial:
    """Stack partials of one shape along a new leading dim, ready for `merge`."""
    return Partial(torch.stack([part.out for part in parts]), torch.stack([part.lse for part in parts]))


def empty(out_shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Partial:
    """Return the identity of `merge`, `(0, -inf)`, for `out_shape = [B, T, H, D_v]`."""
    out = torch.zeros(out_shape, dtype=dtype, device=device)
    return Partial(out, torch.full(out_shape[:-1], float("-inf"), dtype=dtype, device=device))


def add_sinks(partial: Partial, sinks: Tensor) -> Partial:
    """Merge with one more key per head, of score `sinks` `[H]` and value 0 (an attention sink)."""
    lse = sinks.to(partial.lse.dtype).expand_as(partial.lse)
    return merge(stack([partial, Partial(torch.zeros_like(partial.out), lse)]))
