"""The paper's energy function: a log-partition function with a source, whose gradient is attention.

For one query with scaled scores `s_a` and values `v_a`, and a source `zeta` of the shape of a value:

    F(zeta) = log sum_a exp(s_a + zeta . v_a)            dF/dzeta at 0 = sum_a softmax(s)_a v_a = out      F(0) = lse

arXiv 2408.04093, equations 5-6 (one query), 25-28 (causal, heads) and 35-38 (safe form); docs/math.md derives it.
"""

from typing import Any

import torch
from torch import Tensor

from .errors import InputError, Unsupported
from .local import check_call
from .partial import Partial


def attention_energy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    zeta: Tensor,
    *,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """F = log sum_a exp(s_a + zeta.v_a), s_a = cap(scale q.k_a), for every query token and head. Memory O(B H T S).

    Differentiable to any order in q, k, v and zeta. The energies of disjoint sets of keys combine by logsumexp.

    Args:
        q, k, v: as in `attend`, float32 or float64; F is computed in their dtype.
        zeta: `[B, T, H, D_v]`, the source, same dtype and device.
        q_positions, k_positions, mask, scale, softcap: as in `attend`; the cap applies to the score, not to the source.

    Returns:
        `[B, T, H]`; -inf, with gradient 0, for a query that sees no key.

    Raises:
        InputError: shapes, dtypes, devices or values are inconsistent, or the inputs are 16-bit.
    """
    positions = {"q_positions": q_positions, "k_positions": k_positions}
    call = check_call(q, k, v, **positions, mask=mask, scale=scale, softcap=softcap)
    visible = call.selection.visible(q, k)
    shape = (*q.shape[:-1], v.shape[-1])
    if q.dtype not in (torch.float64, torch.float32):
        raise InputError(f"the energy needs float32 or float64, got {q.dtype}: widen q, k and v, as by .float()")
    if zeta.shape != shape or zeta.dtype != q.dtype or zeta.device != q.device:
        got = f"{zeta.dtype} {list(zeta.shape)} on {zeta.device}"
        raise InputError(f"zeta must be {q.dtype} {list(shape)} on {q.device}, got {got}")
    scores = _products(q, k) * call.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + _products(zeta, v)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return _log_sum_exp(scores).transpose(1, 2)


def attention_from_energy(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Partial:
    """`(dF/dzeta, F)` at zeta = 0: exact attention by differentiation, itself differentiable in q, k and v.

    It gives the numbers of `attend` by the paper's definition instead of its algorithm. Arguments (how: q_positions,
    k_positions, mask, scale and softcap) and errors are as in `attention_energy`. It works under `torch.no_grad()`;
    under `torch.inference_mode()` it raises Unsupported.
    """
    if torch.is_inference_mode_enabled():
        raise Unsupported("attention_from_energy needs autograd, which torch.inference_mode forbids: use torch.no_grad")
    check_call(q, k, v)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    zeta = q.new_zeros((*q.shape[:-1], v.shape[-1]), requires_grad=True)
    with torch.enable_grad():
        energy = attention_energy(q, k, v, zeta, **how)
        (out,) = torch.autograd.grad(energy.sum(), zeta, create_graph=differentiable)
    return Partial(out, energy if differentiable else energy.detach())


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """`[B, T, H, D]` and `[B, S, H_kv, D]` -> `[B, H, T, S]`; head h of rows meets head `h // (H / H_kv)` of keys."""
    B, T, H, D = rows.shape
    H_kv = keys.shape[2]
    return torch.einsum("btkgd,bskd->bkgts", rows.reshape(B, T, H_kv, H // H_kv, D), keys).flatten(1, 2)


def _log_sum_exp(scores: Tensor) -> Tensor:
    """Log-sum-exp over the last dim; unlike `torch.logsumexp` its gradient is 0, not NaN, where all scores are -inf."""
    if scores.shape[-1] == 0:
        return scores.logsumexp(-1)
    blind = (scores == float("-inf")).all(-1)
    scores = scores.masked_fill(blind.unsqueeze(-1), 0.0)
    peak = scores.detach().amax(-1)
    total = (scores - peak.unsqueeze(-1)).exp().sum(-1)  # at least 1
    return (total.log() + peak).masked_fill(blind, float("-inf"))
