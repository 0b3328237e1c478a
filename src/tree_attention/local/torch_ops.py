"""PyTorch's fused attention operators that return the log-sum-exp, converted to this library's conventions.

They take `[B, H, S, D]`, round `out` to the inputs' dtype (one more rounding per Partial than the reference), and
return a natural-log lse in float32. A row that sees no key has lse 0, NaN or +inf there, and -inf here. They
differentiate `out` but treat lse as a constant; here a gradient that passes through lse raises Unsupported.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import Unsupported
from ..partial import Partial, partial_dtype
from .selection import AttentionCall

aten = torch.ops.aten


def cpu_flash(call: AttentionCall) -> Partial:
    """`aten._scaled_dot_product_flash_attention_for_cpu`: any dtype; a mask costs a float copy of itself."""
    q, k, v, _, scale, _ = call
    B, T, H, _ = q.shape
    H_kv, D_v = k.shape[2], v.shape[3]
    visible, is_causal = _mask_and_causal(call)
    bias = None if visible is None else _bias(visible, q.dtype)
    if T == 1:  # the query heads of one KV head become rows of one query block: the KV is read once, not H / H_kv times
        q = q.unflatten(2, (H_kv, -1)).flatten(1, 2).transpose(1, 2)  # [B, 1 * H_kv, G, D] -> [B, G, H_kv, D]
        if bias is not None and bias.shape[1] == H:
            bias = bias.reshape(bias.shape[0], H_kv, H // H_kv, -1)  # as the queries: [B, H_kv, G, S]
    heads, how = _heads_first(*_one_head_dim(q, k, v)), {"is_causal": is_causal, "attn_mask": bias, "scale": scale}
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads, **how)
    if T == 1:
        out, lse = out.reshape(B, H, 1, -1), lse.reshape(B, H, 1)
    return _partial(out[..., :D_v], lse, visible)


def cpu_flash_obstacle(call: AttentionCall) -> str | None:
    if call.q.device.type != "cpu":
        return f"runs on CPU tensors, got {call.q.device.type}"
    return _softcap_obstacle(call)


def cuda_flash(call: AttentionCall) -> Partial:
    """`aten._scaled_dot_product_flash_attention` (FlashAttention-2, split-KV for few queries)."""
    heads, how = _heads_first(call.q, call.k, call.v), {"is_causal": call.selection.causal, "scale": call.scale}
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads, **how)
    return _partial(out, lse, None)


def cudnn(call: AttentionCall) -> Partial:
    """`aten._scaled_dot_product_cudnn_attention`: the fastest of PyTorch's operators on Hopper (docs/log.md)."""
    heads, how = _heads_first(call.q, call.k, call.v), {"is_causal": call.selection.causal, "scale": call.scale}
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads, None, True, **how)
    return _partial(out, lse.reshape(out.shape[:-1]), None)


def cudnn_obstacle(call: AttentionCall) -> str | None:
    found = half_precision_obstacle(call)
    if found is None and not torch.backends.cudnn.is_available():
        return "needs cuDNN, which this PyTorch does not have"
    return found


def efficient(call: AttentionCall) -> Partial:
    """`aten._scaled_dot_product_efficient_attention`: masks and float32 on CUDA; no split-KV, repeats KV heads."""
    q, k, v, _, scale, _ = call
    H, G = q.shape[2], q.shape[2] // k.shape[2]
    (visible, is_causal), bias = _mask_and_causal(call), None
    if visible is not None:
        S = k.shape[1]
        bias = pad(_bias(visible, q.dtype), (0, -S % 16))[..., :S]  # the kernel needs rows aligned to 16 elements
        bias = bias.expand(q.shape[0], H, -1, -1)
    heads = _heads_first(q, k.repeat_interleave(G, 2), v.repeat_interleave(G, 2))
    how = {"is_causal": is_causal, "scale": scale}
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(*heads, bias, True, **how)
    return _partial(out, lse[..., : q.shape[1]], visible)


def efficient_obstacle(call: AttentionCall) -> str | None:
    q, v = call.q, call.v
    if q.device.type != "cuda":
        return f"runs on CUDA tensors, got {q.device.type}"
    if q.dtype == torch.float64:
        return "does not have float64"
    if q.shape[3] % 8 or v.shape[3] % 8:
        return f"needs head dims that are multiples of 8, got {q.shape[3]} and {v.shape[3]}"
    return _softcap_obstacle(call)


def half_precision_obstacle(call: AttentionCall) -> str | None:
    q, v = call.q, call.v
    if q.device.type != "cuda":
        return f"runs on CUDA tensors, got {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"has bfloat16 and float16 only, got {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 256:
        return f"needs one head dim, a multiple of 8 up to 256, got {q.shape[3]} and {v.shape[3]}"
    if call.selection.has_rules:
        return "has no masks (local_seqlens, positions or mask)"
    return _softcap_obstacle(call)


def _softcap_obstacle(call: AttentionCall) -> str | None:
    return None if call.softcap is None else "has no softcap"


def _mask_and_causal(call: AttentionCall) -> tuple[Tensor | None, bool]:
    """Return the mask, and whether the operator applies the causal rule itself."""
    selection = call.selection
    return (None, True) if selection.causal and not selection.has_rules else (selection.visible(call.q, call.k), False)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """`[B, S, H, D]` -> `[B, H, S, D]` views with a contiguous last dim."""
    return [(t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in tensors]


def _one_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-pad the shorter of D and D_v: zeros add nothing to a score, and their outputs are dropped."""
    D, D_v = k.shape[3], v.shape[3]
    if D_v > D:
        return pad(q, (0, D_v - D)), pad(k, (0, D_v - D)), v
    return q, k, pad(v, (0, D - D_v)) if D_v < D else v


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _partial(out: Tensor, lse: Tensor, visible: Tensor | None) -> Partial:
    """out `[B, H, T, D_v]`, lse `[B, H, T]` -> Partial; rows without a visible key become `(0, -inf)`."""
    dtype = partial_dtype(out.dtype)
    out, lse = out.to(dtype), lse.to(dtype)
    if torch.is_grad_enabled() and out.requires_grad:
        lse = _WithoutGradient.apply(lse, out)
    if visible is not None:
        blind = ~visible.any(-1)  # [B or 1, H or 1, T]
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, float("-inf"))
    return Partial(out.transpose(1, 2), lse.transpose(1, 2))


class _WithoutGradient(torch.autograd.Function):
    """lse, as a function of the inputs of `out` whose derivative PyTorch does not provide."""

    @staticmethod
    def forward(lse: Tensor, out: Tensor) -> Tensor:
        return lse.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise Unsupported("PyTorch's fused attention has no gradient of its log-sum-exp: use backend='reference'")
