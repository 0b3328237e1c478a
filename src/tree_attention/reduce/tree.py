"""Recursive doubling: in round i each rank swaps its partial with the rank at distance 2^i, and both merge.

Both partners merge in rank order, so they hold the same bits, and after the last round all ranks do. If P is not a
power of two, the ranks past the largest power Q <= P first send their partial to rank - Q, sit out the rounds, and
receive the result at the end.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..partial import Partial, merge
from .collectives import pack, swap, unpack


def recursive_doubling(partial: Partial, group: ProcessGroup) -> Partial:
    """Return the merge of all ranks' partials, on every rank."""
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


def _merge_packed(low: Tensor, high: Tensor) -> Tensor:
    return pack(merge(unpack(torch.stack([low, high]))))
