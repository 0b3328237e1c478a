"""One rank's keys -> Partial. No communication.

`attend` checks, works out which keys each query may see, and hands both to a backend:

reference   plain tensor operations in float32 (float64 from float64); the specification
triton      our split-KV kernel for few queries and many keys: ragged, paged, masked (triton_decode.py)
cpu_flash, cuda_flash, cudnn, efficient   PyTorch's fused operators (torch_ops.py)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, Unavailable
from ..partial import Partial, empty
from . import reference, torch_ops, triton_decode
from .visibility import Selection, keys_of, select

__all__ = ["BACKENDS", "attend", "attend_selected", "check", "choose_backend"]


@dataclass(frozen=True)
class Backend:
    """attend(q, k, v, selection, scale, softcap) -> Partial; obstacle(the same but scale) -> why not, or None."""

    attend: Callable[..., Partial]
    obstacle: Callable[..., str | None]


BACKENDS = {  # in the order in which "auto" tries them
    "cpu_flash": Backend(torch_ops.cpu_flash, torch_ops.cpu_flash_obstacle),
    "triton": Backend(triton_decode.attend, triton_decode.obstacle),
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
    window: int | None = None,
    mask: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = False,
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
        window: together with positions: a query sees only the last `window` positions up to its own.
        mask: bool `[B or 1, H or 1, T, S_local]`, True where a query may see a key; combined with the above by "and".
        page_table: int32 or int64 `[B, max_pages]`; then k and v are pages, `[pages, page_size, H_kv, D or D_v]`, key s
            of row b lies at place `s % page_size` of page `page_table[b, s // page_size]`, and `S_local` stands for
            `max_pages * page_size`. Needs `local_seqlens`; entries past a row's length may be anything.
        causal: query t sees the keys 0 to t, of which there are as many as queries. The same as with equal positions,
            but known to fused operators.
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
    selection = check(
        q, k, v, scale=scale, softcap=softcap, local_seqlens=local_seqlens, q_positions=q_positions,
        k_positions=k_positions, window=window, mask=mask, page_table=page_table, causal=causal,
    )  # fmt: skip
    return attend_selected(q, k, v, selection, scale=scale, softcap=softcap, backend=backend)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None, softcap: float | None, backend: str
) -> Partial:
    """`attend` after its checks."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend(q, k, v, selection=selection, softcap=softcap, backend=backend)
    if k.shape[0] * keys_of(k, selection.page_table) == 0 or q.numel() == 0:
        return empty((*q.shape[:-1], v.shape[-1]), dtype=partial_dtype(q.dtype), device=q.device)
    if chosen != "triton":
        k, v = _in_order(k, selection), _in_order(v, selection)
    return BACKENDS[chosen].attend(q, k, v, selection, scale, softcap)


def check(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, softcap: float | None,
    local_seqlens: Tensor | None = None, page_table: Tensor | None = None, **rules: Any,
) -> Selection:  # fmt: skip
    """What `attend` was told about its keys, or the InputError that it raises."""
    _check(q, k, v, local_seqlens, page_table, scale, softcap)
    return select(q, k, local_seqlens=local_seqlens, page_table=page_table, **rules)


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    selection: Selection | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> str:
    """The name of the backend that `attend` uses for these tensors: the first of `BACKENDS` that can run them.

    Decided from shapes, dtypes, the device and what of `selection` and a soft cap there is. A backend asked for by name
    is returned as it is, or refused with Unavailable.
    """
    selection = selection or Selection()
    if backend == "auto":
        return next(name for name, b in BACKENDS.items() if b.obstacle(q, k, v, selection, softcap) is None)
    if backend not in BACKENDS:
        raise InputError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    obstacle = BACKENDS[backend].obstacle(q, k, v, selection, softcap)
    if obstacle:
        raise Unavailable(f"backend {backend!r} {obstacle}: use backend='auto'")
    return backend


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a Partial of inputs of `dtype` is kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    q: Tensor, k: Tensor, v: Tensor, local_seqlens: Tensor | None, page_table: Tensor | None, scale: float | None,
    softcap: float | None,
) -> None:  # fmt: skip
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
    if page_table is None and q.shape[0] != k.shape[0]:
        raise InputError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise InputError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    if k.shape[3] == 0 or v.shape[3] == 0:
        raise InputError(f"head dims must be at least 1, got {k.shape[3]} of k and {v.shape[3]} of v")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise InputError(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")
    if scale is not None and not scale > 0:
        raise InputError(f"scale must be positive, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"softcap must be positive and finite, or None, got {softcap}")
    if page_table is not None:
        integers = page_table.dtype in (torch.int32, torch.int64)
        if page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or not integers or page_table.device != q.device:
            raise InputError(
                f"page_table must be int32 or int64 [{q.shape[0]}, max_pages] on {q.device}, "
                f"got {page_table.dtype} {list(page_table.shape)} on {page_table.device}"
            )
        if local_seqlens is None:
            raise InputError("page_table needs local_seqlens: how many keys of each row there are")
    if local_seqlens is not None:
        if local_seqlens.shape != q.shape[:1] or local_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"local_seqlens must be int32 or int64 [{q.shape[0]}], "
                f"got {local_seqlens.dtype} {list(local_seqlens.shape)}"
            )
        if local_seqlens.device.type == "cpu" and q.shape[0] and not torch.compiler.is_compiling():
            low, high, keys = int(local_seqlens.min()), int(local_seqlens.max()), keys_of(k, page_table)
            if low < 0 or high > keys:
                raise InputError(f"local_seqlens must be between 0 and S_local = {keys}, got {low} to {high}")
            if page_table is not None and page_table.device.type == "cpu":
                begins = torch.arange(page_table.shape[1]) * k.shape[1]
                used = page_table[begins < local_seqlens[:, None]]
                if ((used < 0) | (used >= k.shape[0])).any():
                    raise InputError(f"page_table must name pages 0 to {k.shape[0] - 1} within a row's length")


def _in_order(cache: Tensor, selection: Selection) -> Tensor:
    """Keys or values of all rows `[B, S_local, H_kv, D]`, zero behind the lengths. Copies, if there are lengths.

    Zero, because a mask hides finite values only: 0 * NaN is NaN.
    """
    local_seqlens, page_table = selection.local_seqlens, selection.page_table
    if local_seqlens is None:
        return cache
    if page_table is not None:
        cache = cache[page_table.clamp(0, cache.shape[0] - 1)].flatten(1, 2)
    unused = torch.arange(cache.shape[1], device=cache.device) >= local_seqlens.to(cache.device)[:, None]
    return cache.masked_fill(unused[:, :, None, None], 0.0)
