"""Inside the node, across the nodes, inside again: what crosses between nodes is one merged partial a node.

The rows are cut into slices, of which the i-th rank of each node holds the i-th (topology.py).

1. inside: every rank sends each slice to its holder, who merges the node's parts in rank order
2. across: the holders of a slice swap what they have, and merge it in node order
3. inside: every holder sends its slice to all

Each number is merged in the same order wherever it is merged, so all ranks get the same bits. Rows are what is cut, not
heads: neither must divide, the last slice is filled up.
"""

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from ..partial import Partial, empty, merge
from .collectives import pack, unpack
from .shared_memory import SharedMemoryLink
from .symmetric import SymmetricLink
from .topology import TwoLevel


def two_level(partial: Partial, topology: TwoLevel, group: ProcessGroup) -> Partial:
    """The merge of all ranks' partials, on every rank; `group` is the topology's."""
    rows = partial.lse.numel()
    if rows == 0:
        return partial
    pieces = _cut(pack(partial), topology.slices)
    link = topology.link if topology.link is not None and topology.link.fits(_in_one(pieces)) else None
    mine = _scatter(pieces, topology, group, link)
    if topology.place < topology.slices:
        mine = _across(mine, topology, group)
    whole = _collect(mine, topology, group, link)
    return unpack(whole.flatten(0, 1)[:rows].view(*partial.lse.shape, -1))


def level_bytes(*, rows: int, head_dim: int, node_sizes: Sequence[int], itemsize: int = 4) -> tuple[int, int]:
    """(inside the node, across nodes): bytes that the busiest rank receives on each level, without a link inside."""
    slices = min(node_sizes)
    piece = -(-rows // slices) * (head_dim + 1) * itemsize
    largest = max(node_sizes)
    return (largest - 1 + slices - 1) * piece, (len(node_sizes) - 1) * piece


def _cut(packed: Tensor, slices: int) -> Tensor:
    """`[B, T, H, D_v + 1]` -> `[slices, rows of a slice, D_v + 1]`, filled up with rows that are never read."""
    flat = packed.flatten(0, 2)
    return pad(flat, (0, 0, 0, -len(flat) % slices)).view(slices, -1, packed.shape[-1])


def _scatter(
    pieces: Tensor, topology: TwoLevel, group: ProcessGroup, link: SharedMemoryLink | SymmetricLink | None
) -> Tensor:
    """This rank's slice `[rows of a slice, D_v + 1]`, merged over its node; not meant to be read if it holds none."""
    place, size, slices = topology.place, len(topology.peers), topology.slices
    piece = min(place, slices - 1)
    match link:
        case SymmetricLink():
            if size == slices:
                return pack(link.reduce(_in_one(pieces), scatter=True)).view_as(pieces[0])
            return pack(link.reduce(_in_one(pieces))).view_as(pieces)[piece]
        case SharedMemoryLink():
            parts = link.gather(pieces)[:, piece]
        case None:
            holds = place < slices
            parts = pieces.new_empty((size if holds else 0, *pieces.shape[1:]))
            others = [i for i in range(size) if i != place]
            _swap(
                {topology.peers[i]: pieces[i] for i in others if i < slices},
                {topology.peers[i]: parts[i] for i in others if holds},
                group,
            )
            if not holds:
                return pieces[piece]
            parts[place] = pieces[place]
    return pack(merge(unpack(parts)))


def _across(mine: Tensor, topology: TwoLevel, group: ProcessGroup) -> Tensor:
    """The slice merged over all nodes, in node order."""
    holders = [node[topology.place] for node in topology.nodes]
    parts = mine.new_empty((len(holders), *mine.shape))
    others = [i for i, holder in enumerate(holders) if holder != group.rank()]
    parts[holders.index(group.rank())] = mine
    _swap({holders[i]: mine for i in others}, {holders[i]: parts[i] for i in others}, group)
    return pack(merge(unpack(parts)))


def _collect(
    mine: Tensor, topology: TwoLevel, group: ProcessGroup, link: SharedMemoryLink | SymmetricLink | None
) -> Tensor:
    """All slices `[slices, rows of a slice, D_v + 1]`."""
    place, peers, slices = topology.place, topology.peers, topology.slices
    holds = place < slices
    match link:
        case SymmetricLink():
            nothing = empty((slices, len(mine), mine.shape[-1] - 1), dtype=mine.dtype, device=mine.device)
            whole = pack(nothing)
            if holds:
                whole[place] = mine  # merged with nothing from the others, it stays as it is
            return pack(link.reduce(_in_one(whole))).view_as(whole)
        case SharedMemoryLink():
            return link.gather(mine)[:slices]
        case None:
            whole = mine.new_empty((slices, *mine.shape))
            if holds:
                whole[place] = mine
            _swap(
                {peer: mine for peer in peers if holds and peer != group.rank()},
                {peers[i]: whole[i] for i in range(slices) if i != place},
                group,
            )
            return whole


def _in_one(pieces: Tensor) -> Partial:
    """`[slices, rows of a slice, D_v + 1]` as a Partial `[1, 1, rows, D_v]`, a shape that links take."""
    return unpack(pieces.flatten(0, 1)[None, None])


def _swap(outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], group: ProcessGroup) -> None:
    """Send to and receive from ranks of the group, all at once; both hold contiguous tensors by rank."""
    operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for peer, tensor in outgoing.items()]
    operations += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for peer, tensor in incoming.items()]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
