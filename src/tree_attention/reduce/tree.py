"""Recursive doubling: in round i each rank swaps its partial with the rank at distance 2^i, and both merge.

Both partners merge in rank order, so they hold the same bits, and after the last round all ranks do. If P is not a
power of two, the ranks past the largest power Q <= P first send their partial to rank - Q, sit out the rounds, and
receive the result at the end.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..partial import Partial, merge
from .collectives import pack, unpack


def recursive_doubling(partial: Partial, group: ProcessGroup) -> Partial:
    """Return the merge of all ranks' partials, on every rank."""
    rank, size = group.rank(), group.size()
    power = 1 << (size.bit_length() - 1)
    mine = pack(partial).contiguous()
    if rank >= power:
        _exchange(group, send_to=rank - power, send=mine)
        return unpack(_exchange(group, receive_from=rank - power, like=mine))
    if rank + power < size:
        mine = _merge_packed(mine, _exchange(group, receive_from=rank + power, like=mine))
    distance = 1
    while distance < power:
        partner = rank ^ distance
        theirs = _exchange(group, send_to=partner, send=mine, receive_from=partner, like=mine)
        mine = _merge_packed(mine, theirs) if rank < partner else _merge_packed(theirs, mine)
        distance *= 2
    if rank + power < size:
        _exchange(group, send_to=rank + power, send=mine)
    return unpack(mine)


def _merge_packed(low: Tensor, high: Tensor) -> Tensor:
    return pack(merge(unpack(torch.stack([low, high]))))


def _exchange(
    group: ProcessGroup,
    *,
    send_to: int | None = None,
    send: Tensor | None = None,
    receive_from: int | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Send and receive concurrently, peers by rank in the group. Return the received tensor, empty if none."""
    received = torch.empty(0) if like is None else torch.empty_like(like)
    operations = []
    if send is not None:
        operations.append(dist.P2POp(dist.isend, send, group=group, group_peer=send_to))
    if like is not None:
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=receive_from))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received
