"""Attention during prefill. In context-parallel prefill a chunk's queries and keys are both spread over the ranks.

pass-KV   gather all keys and values; attend with the own queries                      stop H_kv (D + D_v) b bytes
pass-Q    gather the queries; attend over the own keys; reduce-scatter the partials    C H (D b + (D_v + 1) 4) bytes

for a chunk of C = stop - start slots and b bytes per element, both times (P - 1) / P. `choose_pass` takes the smaller:
keys travel while the context is short, queries once it is long.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..local import attend
from ..partial import Partial, merge, stack
from ..reduce.collectives import gather, reduce_scatter, start_gather
from .exchange import CacheRanks

# (query slots [T], key slots [S]) -> bool [B or 1, 1, T, S]; None for the causal rule alone
BuildMask = Callable[[Tensor, Tensor], Tensor] | None
Options = dict[str, Any]  # scale and softcap, as in `attend`


def attend_seen_and_new(
    q: Tensor, k: Tensor, v: Tensor, seen: int, new_mask: Callable[[], Tensor] | None, options: Options
) -> Partial:
    """Causal attention over this rank's keys, of which the first `seen` lie before every query and need no mask.

    new_mask: builds the mask of the other keys; None if these are at exactly the queries' slots.
    """
    parts = []
    if seen or k.shape[1] == 0:
        parts.append(attend(q, k[:, :seen], v[:, :seen], **options))
    if seen < k.shape[1]:
        mask = None if new_mask is None else new_mask()
        parts.append(attend(q, k[:, seen:], v[:, seen:], mask=mask, causal=mask is None, **options))
    return parts[0] if len(parts) == 1 else merge(stack(parts))


def attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, chunk: tuple[int, int], ranks: CacheRanks, build_mask: BuildMask, options: Options
) -> tuple[Partial, float]:
    """Attention of a chunk's queries over all slots up to its end: this rank's Partial, and the bytes it received.

    q: `[B, C / P, H, D]`, this rank's slots of the chunk. k, v: `[B, stop / P, H_kv, ...]`, all keys and values of this
    rank. chunk: start and stop, multiples of `layout.cycle`.
    """
    (start, stop), rank, size, widths = chunk, ranks.rank, ranks.layout.world_size, [k.shape[3], v.shape[3]]
    seen, block, group = start // size, ranks.layout.block, cast(ProcessGroup, ranks.group)

    def slots(first: int, of: Sequence[int]) -> Tensor:
        return torch.cat([ranks.layout.slots(first, stop, other, device=q.device) for other in of])

    if choose_pass(q, k, v, chunk) == "kv":
        both = torch.cat([k, v], -1)
        new, wait_for_new = start_gather(both[:, seen:], group)  # [P, B, C / P, H_kv, D + D_v]
        old, wait_for_old = start_gather(both[:, :seen], group)
        received = (new.nbytes + old.nbytes) * (size - 1) / size
        if build_mask is None:  # attend to the own keys while the others arrive
            parts = _attend_pair(q, k[:, seen:], v[:, seen:], rank, rank, block, options)
            wait_for_new()
            for other in (other for other in range(size) if other != rank):
                k, v = new[other].split(widths, -1)
                parts += _attend_pair(q, k, v, rank, other, block, options)
            wait_for_old()
            k, v = old.transpose(0, 1).flatten(1, 2).split(widths, -1)
            return merge_rows([*parts, (0, attend(q, k, v, **options))] if seen else parts), received
        wait_for_new()
        wait_for_old()
        k, v = torch.cat([old, new], 2).transpose(0, 1).flatten(1, 2).split(widths, -1)
        mask = build_mask(slots(start, [rank]), slots(0, range(size)))
        return attend(q, k, v, mask=mask, **options), received
    by_rank = gather(q, group)
    queries = by_rank.transpose(0, 1).flatten(1, 2)  # [B, C, H, D], one rank after the other
    if build_mask is None:
        parts = [(0, attend(queries, k[:, :seen], v[:, :seen], **options))]  # covers all rows, so it comes first
        for other, theirs in enumerate(by_rank):
            pair = _attend_pair(theirs, k[:, seen:], v[:, seen:], other, rank, block, options)
            parts += [(other * theirs.shape[1] + row, part) for row, part in pair]
        partial = merge_rows(parts)
    else:
        mask = build_mask(slots(start, range(size)), slots(0, [rank]))
        partial = attend(queries, k, v, mask=mask, **options)
    received = (queries.nbytes + partial.out.nbytes + partial.lse.nbytes) * (size - 1) / size
    return reduce_scatter(partial, group, dim=1), received


def _attend_pair(
    q: Tensor, k: Tensor, v: Tensor, asking: int, holding: int, block: int, options: Options
) -> list[tuple[int, Partial]]:
    """Causal attention of rank `asking`'s queries in a chunk over rank `holding`'s keys in it, without a large mask.

    q, k, v: `[B, n, ...]`, one block of each cycle. Of another rank's keys, a query sees whole blocks: those of earlier
    cycles, and that of its own cycle if `holding` < `asking`. The plain causal rule shows all but the end of the last
    one, the diagonal block; a second call attends to that rest. Returns partials, each with its first query's index.
    """
    if asking == holding:
        return [(0, attend(q, k, v, causal=True, **options))]
    first = 0 if holding < asking else block
    n = q.shape[1] - first
    if n == 0:
        return []
    q, k, v = q[:, first:], k[:, :n], v[:, :n]
    parts = [(first, attend(q, k, v, causal=True, **options))]
    if block > 1:
        rest = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)[None, None]
        blocks = [tensor.unflatten(1, (-1, block)).flatten(0, 1) for tensor in (q, k, v)]
        out, lse = attend(*blocks, mask=rest, **options)
        parts.append((first, Partial(out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3]))))
    return parts


def merge_rows(parts: list[tuple[int, Partial]]) -> Partial:
    """Merge partials that begin at different queries, in place. `parts[0]` covers all queries, and is overwritten."""
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
    """Return "kv" or "q", whichever moves fewer bytes; from values that all ranks share. q: `[B, C / P, H, D]`."""
    start, stop = chunk
    H, D, D_v = q.shape[2], q.shape[3], v.shape[3]
    kv_bytes = stop * k.shape[2] * (D + D_v) * k.element_size()
    q_bytes = (stop - start) * H * (D * q.element_size() + (D_v + 1) * 4)
    return "kv" if kv_bytes <= q_bytes else "q"
