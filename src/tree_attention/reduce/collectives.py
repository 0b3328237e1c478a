"""Reductions without a link: one packed exchange, the paper's three all-reduces, or recursive doubling in pairs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..partial import Partial, merge

# torch 2.13 renamed it; the old name warns
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(partial: Partial, group: ProcessGroup) -> Partial:
    """Gather every rank's partial, packed in one tensor, and merge them in rank order."""
    return merge(unpack(gather(pack(partial), group)))


def all_reduce(partial: Partial, group: ProcessGroup) -> Partial:
    """Algorithm 3 of arXiv 2408.04093 as printed: all-reduce the maximum, then the numerator, then the denominator."""
    partial = Partial(partial.out.contiguous(), partial.lse.contiguous())  # gloo ignores strides
    peak = partial.lse.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    shift = peak.masked_fill(peak == float("-inf"), 0.0)  # rows for which no rank has a key
    denominator = (partial.lse - shift).exp()
    numerator = partial.out * denominator.unsqueeze(-1)
    dist.all_reduce(numerator, dist.ReduceOp.SUM, group)
    dist.all_reduce(denominator, dist.ReduceOp.SUM, group)
    return Partial(numerator / denominator.clamp_min(1.0).unsqueeze(-1), denominator.log() + shift)


def reduce_scatter(partial: Partial, group: ProcessGroup, dim: int = 2) -> Partial:
    """Merge and scatter: rank r gets the r-th of P equal pieces along `dim` (1: tokens, 2: heads). One all-to-all."""
    pieces = torch.stack(pack(partial).chunk(group.size(), dim))  # [P, ...]: piece r goes to rank r
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return merge(unpack(received))


def recursive_doubling(partial: Partial, group: ProcessGroup) -> Partial:
    """In round i each rank swaps its partial with the rank at distance 2^i, and both merge, in rank order.

    So both partners hold the same bits, and after the last round all ranks do. If P is not a power of two, the ranks
    past the largest power Q <= P first send their partial to rank - Q, sit out the rounds, and receive the result at
    the end.
    """
    rank, size = group.rank(), group.size()
    power = 1 << (size.bit_length() - 1)
    mine = pack(partial).contiguous()
    theirs = torch.empty_like(mine)
    if rank >= power:
        swap({rank - power: mine}, {}, group)
        swap({}, {rank - power: theirs}, group)
        return unpack(theirs)
    if rank + power < size:
        swap({}, {rank + power: theirs}, group)
        mine = _merge_packed(mine, theirs)
    distance = 1
    while distance < power:
        partner = rank ^ distance
        swap({partner: mine}, {partner: theirs}, group)
        mine = _merge_packed(mine, theirs) if rank < partner else _merge_packed(theirs, mine)
        distance *= 2
    if rank + power < size:
        swap({rank + power: mine}, {}, group)
    return unpack(mine)


def gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Gather `[...]` of each rank to `[P, ...]` on every rank, in rank order."""
    gathered, wait = start_gather(tensor, group)
    wait()
    return gathered


def start_gather(tensor: Tensor, group: ProcessGroup) -> tuple[Tensor, Callable[[], object]]:
    """Start `gather`. Return its result and a function that waits for it; call that before reading the result."""
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    if tensor.numel() == 0:
        return gathered, lambda: None
    flat = gathered.flatten(0, 1) if tensor.ndim else gathered
    work: Any = _all_gather_single(flat, tensor.contiguous(), group=group, async_op=True)
    return gathered, work.wait


def swap(outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], group: ProcessGroup) -> None:
    """Send and receive contiguous tensors, by rank of the group, all concurrently."""
    operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for peer, tensor in outgoing.items()]
    operations += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for peer, tensor in incoming.items()]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def pack(partial: Partial) -> Tensor:
    """Pack out `[..., D_v]` and lse `[...]` as `[..., D_v + 1]`, the form in which partials travel."""
    return torch.cat([partial.out, partial.lse.unsqueeze(-1)], -1)


def unpack(packed: Tensor) -> Partial:
    """Return the Partial packed as `[..., D_v + 1]`; views, no copy."""
    return Partial(packed[..., :-1], packed[..., -1])


def _merge_packed(low: Tensor, high: Tensor) -> Tensor:
    return pack(merge(unpack(torch.stack([low, high]))))
