"""Attention over keys that are spread across ranks: check, attend, reduce, sinks, round."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import fused
from .errors import InputError, TreeAttentionError, Unavailable
from .group import Group, check_agreement, rank_and_size, resolve_group
from .local import attend_selected, check
from .local.visibility import Selection
from .partial import Partial, merge, stack
from .reduce import Link, SymmetricLink, check_no_gradient, check_reduction, check_scatter, tree_reduce

FUSED = ("fused", "fused_scatter")


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

    Exact: the same function as unsharded attention, up to the float32 rounding of the merge; bit for bit the same on
    every rank. One exchange of `(out, lse)`, of a size that does not depend on the number of keys.

    Args:
        q: `[B, T, H, D]`, the same on every rank.
        k, v: `[B, S_local, H_kv, D]` and `[B, S_local, H_kv, D_v]`, this rank's keys; S_local may differ between
            ranks and may be 0.
        group: the ranks that share the keys: a process group, a 1-D DeviceMesh, None for all, or a link over one of
            these (`SymmetricLink` on GPUs of one host, `SharedMemoryLink` on CPUs, `TwoLevel` over several hosts).
        local_seqlens, q_positions, k_positions, window, mask, page_table, scale, softcap, backend: as in `attend`,
            about this rank's keys.
        sinks: `[H]`, one more logit a head that takes weight and has no value (GPT-OSS); counted once, not per rank.
        algorithm: as in `tree_reduce`; or, with a SymmetricLink, "fused": decoding and the exchange in one launch, or
            "fused_scatter", which leaves each rank its own heads. "auto" is "fused" where that can be had, which
            `choose_path` tells, otherwise what `tree_reduce` takes.
        verify: ask all ranks, before anything else, whether they were called alike and find no fault: then every
            rank raises, none is left waiting. One collective of Python objects; for set-up and debugging.

    Returns:
        `[B, T, H, D_v]` in q's dtype, or `[B, T, H / P, D_v]` with an algorithm that ends in "scatter". Queries that
        see no key on any rank give 0.

    Raises:
        InputError, Unavailable: as in `attend` and `tree_reduce`.
        Unsupported: q, k or v require a gradient, and there are several ranks.
        RanksDisagree: with `verify`, on every rank.
    """
    choices: dict[str, Any] = {"scale": scale, "softcap": softcap, "backend": backend}
    keys: dict[str, Any] = {
        "local_seqlens": local_seqlens, "q_positions": q_positions, "k_positions": k_positions, "window": window,
        "mask": mask, "page_table": page_table,
    }  # fmt: skip
    if verify:
        _vote(q, k, v, keys, choices, sinks, algorithm, group)
    selection = _check(q, k, v, keys, choices, sinks, algorithm, group)
    if isinstance(group, SymmetricLink):
        group.check()
    if (
        isinstance(group, SymmetricLink)
        and algorithm in ("auto", *FUSED)
        and q.numel() > 0
        and choose_path(q, k, v, selection, softcap, group, backend, algorithm) == "fused"
    ):
        return fused.fused_decode(
            q, k, v, selection, group, scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap,
            sinks=sinks, scatter=algorithm == "fused_scatter",
        )  # fmt: skip
    partial = attend_selected(q, k, v, selection, **choices)
    total = tree_reduce(partial, group, algorithm=algorithm.replace("fused", "symmetric"))  # "fused": nothing to decode
    if sinks is not None:
        total = add_sinks(total, _own_heads(sinks, total, group))
    return total.out.to(q.dtype)


def choose_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    softcap: float | None,
    link: SymmetricLink,
    backend: str = "auto",
    algorithm: str = "auto",
) -> str:
    """ "fused", or "apart": first `attend`, then `tree_reduce`. From shapes and dtypes, which all ranks share.

    Raises Unavailable if "fused" was asked for by name and cannot run, InputError as `tree_reduce` does.
    """
    check_scatter(q.shape[2], link.group, algorithm)
    obstacle = fused.obstacle(q, k, v, selection, softcap, link)
    if obstacle is None and backend not in ("auto", "triton"):
        obstacle = f"has a kernel of its own, got backend {backend!r}"
    if obstacle is not None and algorithm in FUSED:
        raise Unavailable(f"algorithm {algorithm!r} {obstacle}: use algorithm='auto'")
    return "fused" if obstacle is None else "apart"


def add_sinks(partial: Partial, sinks: Tensor) -> Partial:
    """Merge with one more key a head, of score `sinks` `[H]` and value 0."""
    lse = sinks.to(partial.lse.dtype).expand_as(partial.lse)
    return merge(stack([partial, Partial(torch.zeros_like(partial.out), lse)]))


def _own_heads(sinks: Tensor, partial: Partial, group: Group | Link) -> Tensor:
    """The sinks of the heads that reduce_scatter left on this rank; all of them otherwise."""
    heads = partial.lse.shape[2]
    if heads == sinks.shape[0]:
        return sinks
    first = rank_and_size(_process_group(group))[0] * heads
    return sinks[first : first + heads]


def _process_group(group: Group | Link) -> ProcessGroup | None:
    return group.group if isinstance(group, Link) else resolve_group(group)


def _vote(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: dict[str, Any],
    choices: dict[str, Any],
    sinks: Tensor | None,
    algorithm: str,
    group: Group | Link,
) -> None:
    """Try everything that needs no communication, then compare what all ranks found."""
    error, described = None, {}
    try:
        selection = _check(q, k, v, keys, choices, sinks, algorithm, group)
        described = {
            "q": f"{list(q.shape)} {q.dtype} {q.device.type}",
            "KV heads": k.shape[2],
            "D_v": v.shape[3],
            "sinks": sinks is not None,
            "link": type(group).__name__ if isinstance(group, Link) else None,
            "algorithm": algorithm,
            **choices,
        }
        if isinstance(group, SymmetricLink) and algorithm in FUSED:
            choose_path(q, k, v, selection, choices["softcap"], group, choices["backend"], algorithm)
        else:
            check_reduction(attend_selected(q, k, v, selection, **choices), group, algorithm)
    except Exception as fault:  # whatever it is: raised here alone it would leave the other ranks waiting
        error = str(fault) if isinstance(fault, TreeAttentionError) else f"{type(fault).__name__}: {fault}"
    check_agreement(described, _process_group(group), error=error)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: dict[str, Any],
    choices: dict[str, Any],
    sinks: Tensor | None,
    algorithm: str,
    group: Group | Link,
) -> Selection:
    """All that is wrong by itself on one rank, before any communication."""
    selection = check(q, k, v, **keys, scale=choices["scale"], softcap=choices["softcap"])
    if sinks is not None and (sinks.shape != q.shape[2:3] or sinks.device != q.device):
        raise InputError(f"sinks must be [{q.shape[2]}] on {q.device}, got {list(sinks.shape)} on {sinks.device}")
    if algorithm in FUSED and not isinstance(group, SymmetricLink):
        raise InputError(f"{algorithm} needs a SymmetricLink as the group, got {type(group).__name__}")
    check_no_gradient(_process_group(group), q, k, v)
    return selection
