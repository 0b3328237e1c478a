"""Attention over keys that are spread across ranks: resolve the route, attend, reduce, sinks, round."""

from typing import Any, cast

from torch import Tensor

from . import fused
from .errors import TreeAttentionError
from .group import Group, check_agreement
from .local import AttentionCall, run_backend
from .partial import add_sinks
from .reduce import Link, SymmetricLink, process_group_of, run_reduction
from .route import Route, resolve


def tree_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | Link = None,
    local_seqlens: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    algorithm: str = "auto",
    verify: bool = False,
) -> Tensor:
    """Softmax attention of `q` over the keys of all ranks, without moving a key.

    Exact: the same function as unsharded attention, up to the float32 rounding of the merge, and the same bits on every
    rank. One exchange of `(out, lse)`, whose size does not depend on the number of keys.

    Args:
        q: `[B, T, H, D]`, the same on every rank.
        k, v: `[B, S_local, H_kv, D]` and `[B, S_local, H_kv, D_v]`, this rank's keys and values. S_local may differ
            between ranks and may be 0.
        group: the ranks that share the keys: a process group, a 1-D DeviceMesh, None for all, or a link over one of
            these (`SymmetricLink` on GPUs of one host, `SharedMemoryLink` on CPUs, `TwoLevel` over several hosts).
        local_seqlens, q_positions, k_positions, window, mask, page_table, scale, softcap, backend: as in `attend`,
            for this rank's keys.
        sinks: `[H]`, one more logit per head that takes weight but has no value (GPT-OSS). It is counted once, not
            once per rank.
        algorithm: as in `tree_reduce`; with a SymmetricLink also "fused", decoding and the exchange in one launch, and
            "fused_scatter", which gives each rank its own heads only. "auto" is "fused" if supported, otherwise as in
            `tree_reduce`; `explain` says what it is for given arguments, and why.
        verify: before anything else, let all ranks compare their arguments and report faults. If there is a fault every
            rank raises, so that none is left waiting. One collective of Python objects; for set-up and debugging.

    Returns:
        `[B, T, H, D_v]` in q's dtype, or `[B, T, H / P, D_v]` with an algorithm that scatters heads. Queries that see
        no key on any rank give 0.

    Raises:
        InputError, Unavailable: as in `attend` and `tree_reduce`.
        Unsupported: q, k or v requires a gradient, and there are several ranks.
        RanksDisagree: with `verify`, on every rank.

    Example:
        >>> out = tree_decode(q, k, v, local_seqlens=held, group=link)
    """
    how: dict[str, Any] = {"group": group, "sinks": sinks, "backend": backend, "algorithm": algorithm}
    how |= {"local_seqlens": local_seqlens, "page_table": page_table, "scale": scale, "softcap": softcap}
    how |= {"q_positions": q_positions, "k_positions": k_positions, "window": window, "mask": mask}
    if verify:
        _vote(q, k, v, how)
    if isinstance(group, Link):
        group.check()
    return run(*resolve(q, k, v, **how), sinks)


def run(call: AttentionCall, route: Route, sinks: Tensor | None) -> Tensor:
    """Run a call that `resolve` checked."""
    if route.is_fused:
        return fused.fused_decode(call, cast(SymmetricLink, route.link), sinks, scatter=route.scatters)
    total = run_reduction(run_backend(call, route.backend), route)
    if sinks is not None:
        heads = total.lse.shape[2]  # those that the reduction gives this rank
        first = route.rank * heads if heads < sinks.shape[0] else 0
        total = add_sinks(total, sinks[first : first + heads])
    return total.out.to(call.q.dtype)


def _vote(q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> None:
    group, error, described = how["group"], None, {}
    try:
        resolve(q, k, v, **how)
        described = {"q": f"{list(q.shape)} {q.dtype} {q.device.type}", "KV heads": k.shape[2], "D_v": v.shape[3]}
        described |= {"link": type(group).__name__ if isinstance(group, Link) else None}
        described |= {name: how[name] for name in ("algorithm", "scale", "softcap", "backend")}
        described |= {"sinks": how["sinks"] is not None}
    except Exception as fault:  # any fault: raised on one rank alone it would leave the others waiting
        error = str(fault) if isinstance(fault, TreeAttentionError) else f"{type(fault).__name__}: {fault}"
    check_agreement(described, process_group_of(group), error=error)
