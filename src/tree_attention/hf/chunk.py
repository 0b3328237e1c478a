"""Attention of one chunk of the prompt, its queries and its keys spread over the ranks (context-parallel prefill).

Each rank comes with the queries of its own slots, and leaves with their attention over every earlier slot. Either the
keys travel or the queries do:

pass-KV   gather all keys and values; attend with the own queries                      stop H_kv (D + D_v) b bytes
pass-Q    gather the queries; attend over the own keys; reduce-scatter the partials    C H (D b + (D_v + 1) 4) bytes

for a chunk of C = stop - start slots and b bytes an element, times (P - 1) / P for both. `choose_pass` takes the
smaller, so keys travel while the context is short, queries once it is long; memory stays bounded by the chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..layout import Layout
from ..local import attend
from ..partial import Partial, merge, stack
from ..reduce.collectives import gather, reduce_scatter, start_gather

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
    all_here: bool,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention over keys of which the first `seen` lie before every query.

    With the causal rule alone, those need no mask: they and the others are attended to apart, and merged. all_here: the
    others are the queries' own slots, all of them.
    """
    if not causal_only:
        mask = build_mask(query_slots, key_slots)
        return attend(q, k, v, mask=mask, scale=scale, softcap=softcap)
    parts = []
    if seen or k.shape[1] == 0:
        parts.append(attend(q, k[:, :seen], v[:, :seen], scale=scale, softcap=softcap))
    if seen < k.shape[1]:
        mask = None if all_here else build_mask(query_slots, key_slots[seen:])
        new = {"mask": mask, "causal": all_here, "scale": scale, "softcap": softcap}
        parts.append(attend(q, k[:, seen:], v[:, seen:], **new))
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
    passed, seen, D, D_v = choose_pass(q, k, v, chunk), start // size, k.shape[3], v.shape[3]
    how: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if passed == "kv":
        both = torch.cat([k, v], -1)
        new, new_arrives = start_gather(both[:, seen:], group)  # [P, B, C / P, H_kv, D + D_v]
        old, old_arrives = start_gather(both[:, :seen], group)
        received = (new.nbytes + old.nbytes) * (size - 1) / size
        if causal_only:  # begins with what is here already
            parts = _attend_pair(q, k[:, seen:], v[:, seen:], rank, rank, layout.block, **how)
            new_arrives()
            for other in (other for other in range(size) if other != rank):
                k, v = new[other].split([D, D_v], -1)
                parts += _attend_pair(q, k, v, rank, other, layout.block, **how)
            old_arrives()
            k, v = old.transpose(0, 1).flatten(1, 2).split([D, D_v], -1)
            return merge_rows([*parts, (0, attend(q, k, v, **how))] if seen else parts), received
        new_arrives()
        old_arrives()
        k, v = torch.cat([old, new], 2).transpose(0, 1).flatten(1, 2).split([D, D_v], -1)
        key_slots = torch.cat([layout.slots(0, stop, r, device=q.device) for r in range(size)])
        mask = build_mask(layout.slots(start, stop, rank, device=q.device), key_slots)
        return attend(q, k, v, mask=mask, **how), received
    by_rank = gather(q, group)
    queries = by_rank.transpose(0, 1).flatten(1, 2)  # [B, C, H, D], rank after rank
    if causal_only:
        parts = [(0, attend(queries, k[:, :seen], v[:, :seen], **how))]  # all rows, so it comes first
        for other, theirs in enumerate(by_rank):
            pair = _attend_pair(theirs, k[:, seen:], v[:, seen:], other, rank, layout.block, **how)
            parts += [(other * theirs.shape[1] + row, part) for row, part in pair]
        partial = merge_rows(parts)
    else:
        query_slots = torch.cat([layout.slots(start, stop, r, device=q.device) for r in range(size)])
        mask = build_mask(query_slots, layout.slots(0, stop, rank, device=q.device))
        partial = attend(queries, k, v, mask=mask, **how)
    received = (queries.nbytes + partial.out.nbytes + partial.lse.nbytes) * (size - 1) / size
    return reduce_scatter(partial, group, dim=1), received


def _attend_pair(
    q: Tensor, k: Tensor, v: Tensor, asking: int, holding: int, block: int, **how: Any
) -> list[tuple[int, Partial]]:
    """Causal attention of one rank's queries in a chunk over another's keys in it, without a mask of their size.

    q, k, v `[B, n, ...]`, n a multiple of `block`: of each cycle one block. Over a rank's own keys that is the causal
    rule. Of another rank's, a query sees whole blocks: those of earlier cycles, and of its own cycle if the other comes
    first. The last of them is its diagonal block: the causal rule shows its places up to the query's, and what it
    hides are the places behind, for which each block of queries is taken with that block alone.

    Returns partials, each with the first query that it is for.
    """
    if asking == holding:
        return [(0, attend(q, k, v, causal=True, **how))]
    first = 0 if holding < asking else block
    n = q.shape[1] - first
    if n == 0:
        return []
    q, k, v = q[:, first:], k[:, :n], v[:, :n]
    parts = [(first, attend(q, k, v, causal=True, **how))]
    if block > 1:
        behind = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)[None, None]
        blocks = [tensor.unflatten(1, (-1, block)).flatten(0, 1) for tensor in (q, k, v)]
        out, lse = attend(*blocks, mask=behind, **how)
        parts.append((first, Partial(out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3]))))
    return parts


def merge_rows(parts: list[tuple[int, Partial]]) -> Partial:
    """`merge` of partials that begin at different queries, the first one's being all; its memory is used.

    One after the other and in place: those of a chunk are large.
    """
    whole = parts[0][1]
    lse = whole.lse.new_full((len(parts), *whole.lse.shape), float("-inf"))
    for padded, (first, part) in zip(lse, parts, strict=True):
        padded[:, first : first + part.lse.shape[1]] = part.lse
    shift = lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)
    weight = (lse - shift).exp()
    total = weight.sum(0)
    weight = (weight / total.clamp_min(1.0)).unsqueeze(-1)
    out = whole.out.mul_(weight[0])
    for share, (first, part) in zip(weight[1:], parts[1:], strict=True):
        rows = slice(first, first + part.lse.shape[1])
        out[:, rows].addcmul_(part.out, share[:, rows])
    return Partial(out, total.log() + shift)


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
