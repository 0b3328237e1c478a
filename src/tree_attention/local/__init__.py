"""One rank's keys -> Partial. No communication.

`attend` checks, works out which keys each query may see, and hands both to a backend:

reference   plain tensor operations in float32 (float64 from float64); the specification
cpu_flash, cuda_flash, cudnn, efficient   PyTorch's fused operators (torch_ops.py)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, Unavailable
from ..partial import Partial, empty
from . import reference, torch_ops
from .visibility import visible_keys

__all__ = ["BACKENDS", "attend", "choose_backend"]


@dataclass(frozen=True)
class Backend:
    """attend(q, k, v, visible, scale, softcap) -> Partial; obstacle(same) -> why it cannot run, or None."""

    attend: Callable[..., Partial]
    obstacle: Callable[..., str | None]


BACKENDS = {  # in the order in which "auto" tries them
    "cpu_flash": Backend(torch_ops.cpu_flash, torch_ops.cpu_flash_obstacle),
    "cudnn": Backend(torch_ops.cudnn, torch_ops.cudnn_obstacle),
    "cuda_flash": Backend(torch_ops.cuda_flash, torch_ops.cuda_flash_obstacle),
    "efficient": Backend(torch_ops.efficient, torch_ops.efficient_obstacle),
    "reference": Backend(reference.attend, lambda *_: None),
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    local_seqlens: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Partial:
    """Attention of `q` over this rank's keys: out = sum_a p_a v_a and lse = log sum_a exp(s_a), s_a = cap(scale q.k_a).

    Args:
        q: `[B, T, H, D]`, float64, float32, bfloat16 or float16. Any strides.
        k: `[B, S_local, H_kv, D]`, same dtype and device; H must be a multiple of H_kv (query head h reads
            KV head `h // (H / H_kv)`). S_local may be 0.
        v: `[B, S_local, H_kv, D_v]`.
        local_seqlens: int32 or int64 `[B]`: only the first `local_seqlens[b]` keys of row b count, the others may be
            unused memory, NaN included. All keys by default.
        q_positions, k_positions: integers `[T]` or `[B, T]`, and `[S_local]` or `[B, S_local]`; given together they
            make it causal: a query sees the keys whose position is at most its own.
        mask: bool `[B or 1, H or 1, T, S_local]`, True where a query may see a key; combined with the above by "and".
        scale: factor on q.k; `D ** -0.5` by default.
        softcap: `cap(s) = softcap * tanh(s / softcap)`; none by default.
        backend: one of `BACKENDS`, or "auto": what `choose_backend` says.

    Returns:
        Partial with out `[B, T, H, D_v]` and lse `[B, T, H]`, float32 (float64 from float64). A query that sees no key
        gets `(0, -inf)`.

    Raises:
        InputError: shapes, dtypes, devices or values that do not fit. The values of `local_seqlens` are only looked
            at on the CPU: on a GPU that would stop the stream.
        Unavailable: `backend` cannot run this input here; the text says why.
    """
    _check(q, k, v, local_seqlens, scale, softcap)
    visible = visible_keys(q, k, local_seqlens, q_positions, k_positions, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend(q, k, v, visible=visible, softcap=softcap, backend=backend)
    if k.shape[1] == 0 or q.numel() == 0:
        return empty((*q.shape[:-1], v.shape[-1]), dtype=partial_dtype(q.dtype), device=q.device)
    if local_seqlens is not None:
        k, v = _blank_unused(k, local_seqlens), _blank_unused(v, local_seqlens)
    return BACKENDS[chosen].attend(q, k, v, visible, scale, softcap)


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> str:
    """The name of the backend that `attend` uses for these tensors: the first of `BACKENDS` that can run them.

    Decided from shapes, dtypes, the device and whether there is a mask or a soft cap. A backend asked for by name is
    returned as it is, or refused with Unavailable.
    """
    if backend == "auto":
        return next(name for name, b in BACKENDS.items() if b.obstacle(q, k, v, visible, softcap) is None)
    if backend not in BACKENDS:
        raise InputError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    obstacle = BACKENDS[backend].obstacle(q, k, v, visible, softcap)
    if obstacle:
        raise Unavailable(f"backend {backend!r} {obstacle}: use backend='auto'")
    return backend


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a Partial of inputs of `dtype` is kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    q: Tensor, k: Tensor, v: Tensor, local_seqlens: Tensor | None, scale: float | None, softcap: float | None
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise InputError(f"{name} must be 4-D [B, tokens, heads, head_dim], got {tuple(tensor.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"q, k and v must be float64, float32, bfloat16 or float16, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise InputError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if k.shape[:3] != v.shape[:3]:
        raise InputError(f"k and v must agree in [B, S_local, H_kv], got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}")
    if q.shape[0] != k.shape[0]:
        raise InputError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise InputError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise InputError(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")
    if scale is not None and not scale > 0:
        raise InputError(f"scale must be positive, got {scale}")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap must be positive or None, got {softcap}")
    if local_seqlens is not None:
        if local_seqlens.shape != q.shape[:1] or local_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"local_seqlens must be int32 or int64 [{q.shape[0]}], "
                f"got {local_seqlens.dtype} {list(local_seqlens.shape)}"
            )
        if local_seqlens.device.type == "cpu" and q.shape[0]:
            low, high = int(local_seqlens.min()), int(local_seqlens.max())
            if low < 0 or high > k.shape[1]:
                raise InputError(f"local_seqlens must be between 0 and S_local = {k.shape[1]}, got {low} to {high}")


def _blank_unused(cache: Tensor, local_seqlens: Tensor) -> Tensor:
    """Zero what lies behind the lengths: a mask hides finite values only, since 0 * NaN is NaN. Costs a copy."""
    unused = torch.arange(cache.shape[1], device=cache.device) >= local_seqlens.to(cache.device)[:, None]
    return cache.masked_fill(unused[:, :, None, None], 0.0)
