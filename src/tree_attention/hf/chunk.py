"""Attention of one chunk of the prompt, its queries and its keys spread over the ranks (context-parallel prefill).

Each rank comes with the queries of its own slots, and leaves with their attention over every earlier slot. Either the
keys travel or the queries do:

pass-KV   gather all keys and values; attend with the own queries                      stop H_kv (D + D_v) b bytes
pass-Q    gather the queries; attend over the own keys; reduce-scatter the partials    C H (D b + (D_v + 1) 4) bytes

for a chunk of C = stop - start slots and b bytes an element, times (P - 1) / P for both. `choose_pass` takes the
smaller, so keys travel while the context is short, queries once it is long; memory stays bounded by the chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..layout import Layout
from ..local import attend
from ..partial import Partial, merge, stack
from ..reduce.collectives import gather, reduce_scatter

BuildMask = Callable[[Tensor, Tensor], Tensor]  # (query slots [T], key slots [S]) -> bool [B or 1, 1, T, S]


def attend_seen_and_new(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seen: int,
    query_slots: Tensor,
    key_slots: Tensor,
    build_mask: BuildMask,
    causal_only: bool,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention over keys of which the first `seen` lie before every query.

    With the causal rule alone, those need no mask: they and the others are attended to apart, and merged.
    """
    if not causal_only:
        mask = build_mask(query_slots, key_slots)
        return attend(q, k, v, mask=mask, scale=scale, softcap=softcap)
    parts = []
    if seen or k.shape[1] == 0:
        parts.append(attend(q, k[:, :seen], v[:, :seen], scale=scale, softcap=softcap))
    if seen < k.shape[1]:
        mask = build_mask(query_slots, key_slots[seen:])
        parts.append(attend(q, k[:, seen:], v[:, seen:], mask=mask, scale=scale, softcap=softcap))
    return parts[0] if len(parts) == 1 else merge(stack(parts))


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk: tuple[int, int],
    layout: Layout,
    group: ProcessGroup,
    build_mask: BuildMask,
    causal_only: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Partial, float]:
    """q `[B, C / P, H, D]`, the slots of this rank in the chunk; k, v `[B, stop / P, H_kv, ...]`, all that it holds.

    Returns the Partial of those queries over all slots, and the bytes this rank received. `start` and `stop` must be
    multiples of `layout.cycle`.
    """
    start, stop = chunk
    rank, size = group.rank(), group.size()

    def slots(first: int, last: int) -> Tensor:  # of all ranks, one rank after another
        return torch.cat([layout.slots(first, last, r, device=q.device) for r in range(size)])

    how = {"build_mask": build_mask, "causal_only": causal_only, "scale": scale, "softcap": softcap}
    if choose_pass(q, k, v, chunk) == "kv":
        keys_and_values = _gather_seen_first(torch.cat([k, v], -1), start // size, group)
        k, v = keys_and_values.split([k.shape[3], v.shape[3]], -1)
        partial = attend_seen_and_new(
            q, k, v, seen=start, **how,
            query_slots=layout.slots(start, stop, rank, device=q.device),
            key_slots=torch.cat([slots(0, start), slots(start, stop)]),
        )  # fmt: skip
        return partial, keys_and_values.nbytes * (size - 1) / size
    queries = gather(q, group).transpose(0, 1).flatten(1, 2)  # [B, C, H, D], rank after rank
    partial = attend_seen_and_new(
        queries, k, v, seen=start // size, **how,
        query_slots=slots(start, stop),
        key_slots=layout.slots(0, stop, rank, device=q.device),
    )  # fmt: skip
    received = (queries.nbytes + partial.out.nbytes + partial.lse.nbytes) * (size - 1) / size
    return reduce_scatter(partial, group, dim=1), received


def choose_pass(q: Tensor, k: Tensor, v: Tensor, chunk: tuple[int, int]) -> str:
    """ "kv" or "q", whichever moves fewer bytes; from values that all ranks share. q `[B, C / P, H, D]`."""
    start, stop = chunk
    H, D, D_v = q.shape[2], q.shape[3], v.shape[3]
    kv_bytes = stop * k.shape[2] * (D + D_v) * k.element_size()
    q_bytes = (stop - start) * H * (D * q.element_size() + (D_v + 1) * 4)
    return "kv" if kv_bytes <= q_bytes else "q"


def gather_in_slot_order(tensor: Tensor, group: ProcessGroup, block: int) -> Tensor:
    """`[B, H, n, D]` of each rank's slots in a chunk of whole cycles -> `[B, H, P n, D]` in slot order."""
    ranks = gather(tensor, group).unflatten(3, (-1, block))  # [P, B, H, cycles, block, D]
    return ranks.permute(1, 2, 3, 0, 4, 5).flatten(2, 4)


def _gather_seen_first(tensor: Tensor, seen: int, group: ProcessGroup) -> Tensor:
    """`[B, S / P, H, D]` on each rank -> `[B, S, H, D]`: all ranks' first `seen`, then all ranks' others."""
    ranks = gather(tensor, group).transpose(0, 1)  # [B, P, S / P, H, D]
    return torch.cat([ranks[:, :, :seen].flatten(1, 2), ranks[:, :, seen:].flatten(1, 2)], 1)
