"""The specification: attention with its log-sum-exp in plain tensor operations, float32 or float64 throughout."""

import torch

from ..partial import Partial, partial_dtype
from .selection import AttentionCall


def attend(call: AttentionCall) -> Partial:
    """`local.attend` after its checks. Memory O(B H T S)."""
    q, k, v, selection, scale, softcap = call
    dtype = partial_dtype(q.dtype)
    B, T, H, D = q.shape
    H_kv = k.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scores = torch.einsum("btkgd,bskd->bkgts", q.reshape(B, T, H_kv, H // H_kv, D), k).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = selection.visible(q, k)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    shift = peak.masked_fill(peak == float("-inf"), 0.0)  # a row that sees no key
    weights = (scores - shift).exp()
    total = weights.sum(-1, keepdim=True)  # [B, H, T, 1]; 0 or at least 1
    weights = (weights / total.clamp_min(1.0)).unflatten(1, (H_kv, H // H_kv))
    out = torch.einsum("bkgts,bskd->btkgd", weights, v).reshape(B, T, H, v.shape[-1])
    return Partial(out, (total.log() + shift).squeeze(-1).transpose(1, 2))
