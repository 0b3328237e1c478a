"""Attention over this rank's keys -> Partial. No communication.

`attend` checks its arguments, chooses a backend and runs it:

cpu_flash, cuda_flash, cudnn, efficient    PyTorch's fused operators (torch_ops.py)
triton       this library's split-KV kernel for few queries and many keys: ragged, paged, masked (triton_decode.py)
reference    plain tensor operations in float32 (float64 from float64); the specification
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError, Unavailable
from ..partial import Partial, empty
from . import reference, torch_ops, triton_decode
from .selection import AttentionCall, KeySelection, check_call

__all__ = ["BACKENDS", "AttentionCall", "KeySelection", "attend", "check_call", "choose_backend", "run_backend"]


@dataclass(frozen=True)
class Backend:
    attend: Callable[[AttentionCall], Partial]
    obstacle: Callable[[AttentionCall], str | None]  # why it cannot run a call, or None
    reads_pages: bool = False  # takes lengths and page tables itself, instead of keys and values in order


BACKENDS = {  # in the order in which "auto" tries them
    "cpu_flash": Backend(torch_ops.cpu_flash, torch_ops.cpu_flash_obstacle),
    "triton": Backend(triton_decode.attend, triton_decode.obstacle, reads_pages=True),
    "cudnn": Backend(torch_ops.cudnn, torch_ops.cudnn_obstacle),
    "cuda_flash": Backend(torch_ops.cuda_flash, torch_ops.half_precision_obstacle),
    "efficient": Backend(torch_ops.efficient, torch_ops.efficient_obstacle),
    "reference": Backend(reference.attend, lambda _: None),
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
        local_seqlens: int32 or int64 `[B]`: only the first `local_seqlens[b]` keys of row b are used; the others may be
            unused memory, including NaN. Or `[B, T]`, not decreasing along T: query t sees the first
            `local_seqlens[b, t]` keys, as several new tokens at the end of a cache do. Default: all keys.
        q_positions, k_positions: integers `[T]` or `[B, T]`, and `[S_local]` or `[B, S_local]`, given together: causal
            attention, where a query sees the keys whose position is at most its own.
        window: requires positions: a query sees only the last `window` positions up to its own.
        mask: bool `[B or 1, H or 1, T, S_local]`, True where a query may see a key; combined with the above by "and".
        page_table: int32 or int64 `[B, max_pages]`. k and v are then pages `[pages, page_size, H_kv, D or D_v]`, key s
            of row b lies at index `s % page_size` of page `page_table[b, s // page_size]`, and `S_local` is
            `max_pages * page_size`. Requires `local_seqlens`; entries past a row's length are ignored.
        causal: query t sees keys 0 to t; requires as many keys as queries. Equivalent to equal positions, but fused
            operators support it without a mask.
        scale: factor on q.k. Default: `D ** -0.5`.
        softcap: `cap(s) = softcap * tanh(s / softcap)`. Default: none.
        backend: one of `local.BACKENDS`, or "auto": the first of them that can run the input. `tree_attention.explain`
            says which that is.

    Returns:
        Partial with out `[B, T, H, D_v]` and lse `[B, T, H]`, float32 (float64 from float64). A query that sees no key
        gets `(0, -inf)`.

    Raises:
        InputError: shapes, dtypes, devices or values are inconsistent. The values of `local_seqlens` are only checked
            on the CPU; on a GPU that would need a synchronization.
        Unavailable: `backend` cannot run this input here; the message says why.

    Example:
        >>> out, lse = attend(q, k, v, local_seqlens=torch.tensor([4096, 17]))
    """
    cache = {"local_seqlens": local_seqlens, "page_table": page_table}
    rules = {"q_positions": q_positions, "k_positions": k_positions, "window": window, "mask": mask, "causal": causal}
    call = check_call(q, k, v, **cache, **rules, scale=scale, softcap=softcap)
    chosen, _ = choose_backend(call, backend)
    return run_backend(call, chosen)


def choose_backend(call: AttentionCall, backend: str = "auto") -> tuple[str, dict[str, str]]:
    """Return the backend that runs a call, and why "auto" passed over the ones before it.

    The choice depends on shapes, dtypes, the device, and which selection fields and softcap are set. A backend that is
    requested by name is returned as it is, or refused with Unavailable.
    """
    if backend not in (*BACKENDS, "auto"):
        raise InputError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    obstacles = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        obstacle = BACKENDS[name].obstacle(call)
        if obstacle is None:
            return name, obstacles
        obstacles[name] = obstacle
    raise Unavailable(f"backend {backend!r} {obstacles.get(backend)}: use backend='auto'")


def run_backend(call: AttentionCall, backend: str) -> Partial:
    """Run a backend that `choose_backend` returned for this call."""
    if call.is_empty():
        shape, dtype, device = call.spec()
        return empty(shape, dtype=dtype, device=device)
    chosen = BACKENDS[backend]
    return chosen.attend(call if chosen.reads_pages else call.in_order())
