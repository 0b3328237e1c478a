"""`TwoLevel`: inside the node, across the nodes, inside again; one merged partial per node crosses between nodes.

The rows are split into slices, the last one padded, and the i-th rank of each node is the holder of slice i.

1. inside: every rank sends each slice to its holder, which merges the node's parts in rank order
2. across: the holders of a slice exchange it and merge it in node order, so that all get the same bits
3. inside: every holder sends its slice to all ranks of the node
"""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from ..errors import InputError
from ..group import Group, check_agreement, gather_values, rank_and_size, resolve_group
from ..partial import Partial, merge, spec_of
from .collectives import pack, swap, unpack
from .link import Link, NodeLink, rows_of

Nodes = tuple[tuple[int, ...], ...]


class TwoLevel(Link):
    """The ranks of a group, arranged by node. Pass it in place of the group. All ranks construct it together, once.

    Between nodes only one merged partial per node travels, split into as many slices as the smallest node has ranks:
    slice i is exchanged by the i-th ranks of all nodes. With 8 + 8 + 1 ranks one rank per node uses the network.
    `nodes` may also split a host, 8 + 4 ranks as 4 + 4 + 4, so that all ranks use it.

    Args:
        group: a process group, a 1-D DeviceMesh, or None for all ranks.
        nodes: the ranks (within the group) of each node; or an int, that number of consecutive ranks per node; or None:
            by host name, and where GPUs of one host cannot access each other's memory, by peer access.
        link: a link over exactly the ranks of this node, for the exchanges inside it; on every rank or on none.
            Without it, and for partials too large for it: the group's point-to-point calls.

    Attributes:
        nodes: tuple of tuples of ranks, each ascending, ordered by first rank.
        peers: the ranks of this rank's node.
        place: the index of this rank among `peers`.
        slices: the number of slices of a partial.

    Raises:
        InputError: on every rank, if `nodes` does not contain each rank of the group once, or differs from the nodes
            that the links are over; or if this rank is not in the group.
        RanksDisagree: on every rank, if `nodes` or the kind of link differs between ranks.
    """

    algorithms = ("two_level",)

    def __init__(
        self, group: Group = None, nodes: int | Sequence[Sequence[int]] | None = None, *, link: NodeLink | None = None
    ) -> None:
        self.group, self.link = resolve_group(group), link
        rank, size = rank_and_size(self.group)
        check_agreement({"nodes": nodes, "link": type(link).__name__}, self.group)
        given = None if nodes is None else given_nodes(nodes, size)  # raises on every rank or on none
        seats = [Seat(*seat) for seat in gather_values(own_seat(link), self.group)]
        self.nodes: Nodes = given or found_nodes(seats)
        check_links(self.nodes, seats)
        self.peers = next(node for node in self.nodes if rank in node)
        self.place = self.peers.index(rank)
        self.node_sizes = tuple(map(len, self.nodes))
        self.slices = min(self.node_sizes)

    @property
    def carrier(self) -> Link | ProcessGroup | None:
        """This link; with a single node, the link inside it or else the group."""
        if len(self.nodes) > 1:
            return self
        return self.group if self.link is None else self.link

    def reduce(self, partial: Partial, *, scatter: bool = False) -> Partial:
        rows, place, slices = partial.lse.numel(), self.place, self.slices
        if rows == 0 or self.group is None:
            return partial
        flat = pack(partial).flatten(0, 2)  # padded below with rows that are never read
        pieces = pad(flat, (0, 0, 0, -rows % slices)).view(slices, -1, flat.shape[-1])
        link = self.link
        if link is not None and link.obstacle(spec_of(rows_of(pieces))) is not None:
            link = None
        mine = _merge_slices(pieces, self, self.group) if link is None else link.merge_slices(pieces, place)
        if place < slices:
            mine = _across(mine, self, self.group)
        whole = _gather_slices(mine, self, self.group) if link is None else link.gather_slices(mine, place, slices)
        return unpack(whole.flatten(0, 1)[:rows].view(*partial.lse.shape, -1))

    def check(self) -> None:
        if self.link is not None:
            self.link.check()


def level_bytes(*, rows: int, head_dim: int, node_sizes: Sequence[int], itemsize: int = 4) -> tuple[int, int]:
    """Return the bytes (inside the node, across nodes) that the busiest rank receives, without a link inside."""
    slices = min(node_sizes)
    piece = -(-rows // slices) * (head_dim + 1) * itemsize
    largest = max(node_sizes)
    return (largest - 1 + slices - 1) * piece, (len(node_sizes) - 1) * piece


def _merge_slices(pieces: Tensor, topology: TwoLevel, group: ProcessGroup) -> Tensor:
    """`NodeLink.merge_slices` by sends and receives."""
    peers, place, slices = topology.peers, topology.place, topology.slices
    holds, others = place < slices, [i for i in range(len(peers)) if i != place]
    parts = pieces.new_empty((len(peers) if holds else 0, *pieces.shape[1:]))
    outgoing = {peers[i]: pieces[i] for i in others if i < slices}
    swap(outgoing, {peers[i]: parts[i] for i in others if holds}, group)
    if not holds:
        return pieces[slices - 1]
    parts[place] = pieces[place]
    return pack(merge(unpack(parts)))


def _gather_slices(mine: Tensor, topology: TwoLevel, group: ProcessGroup) -> Tensor:
    """`NodeLink.gather_slices` by sends and receives."""
    peers, place, slices = topology.peers, topology.place, topology.slices
    holds, whole = place < slices, mine.new_empty((slices, *mine.shape))
    if holds:
        whole[place] = mine
    outgoing = {peer: mine for peer in peers if holds and peer != group.rank()}
    swap(outgoing, {peers[i]: whole[i] for i in range(slices) if i != place}, group)
    return whole


def _across(mine: Tensor, topology: TwoLevel, group: ProcessGroup) -> Tensor:
    """Merge this rank's slice over all nodes, in node order."""
    holders = [node[topology.place] for node in topology.nodes]
    parts = mine.new_empty((len(holders), *mine.shape))
    others = [i for i, holder in enumerate(holders) if holder != group.rank()]
    parts[holders.index(group.rank())] = mine
    swap({holders[i]: mine for i in others}, {holders[i]: parts[i] for i in others}, group)
    return pack(merge(unpack(parts)))


class Seat(NamedTuple):
    rank: int  # global
    host: str
    device: str  # its GPU, "" if it has none
    reach: list[str] | None  # the GPUs whose memory its GPU can access; None if this process sees only one GPU
    linked: list[int] | None  # the global ranks of its link, None without a link


def own_seat(link: Link | None) -> Seat:
    """Return where this process runs."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    linked = None
    if link is not None:
        linked = [rank] if link.group is None else dist.get_process_group_ranks(link.group)
    device, reach = "", None
    if torch.cuda.is_available():
        names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        here = torch.cuda.current_device()
        device = names[here]
        if len(names) > 1:  # with one visible GPU, peer access is unknown
            reach = [n for i, n in enumerate(names) if i == here or torch.cuda.can_device_access_peer(here, i)]
    return Seat(rank, socket.gethostname(), device, reach, linked)


def found_nodes(seats: Sequence[Seat]) -> Nodes:
    """Group the ranks by node: a rank joins the first node whose first rank is on its host and in its GPU's reach."""
    nodes: list[list[int]] = []
    for rank, seat in enumerate(seats):
        for node in nodes:
            first = seats[node[0]]
            if first.host == seat.host and (seat.reach is None or first.reach is None or first.device in seat.reach):
                node.append(rank)
                break
        else:
            nodes.append([rank])
    return tuple(map(tuple, nodes))


def given_nodes(nodes: int | Sequence[Sequence[int]], size: int) -> Nodes:
    """Return the nodes that a caller specified, checked against the number of ranks."""
    if isinstance(nodes, int):
        if nodes < 1 or size % nodes:
            raise InputError(f"nodes of {nodes} ranks need a number of ranks that divides by it, got {size}")
        return tuple(tuple(range(first, first + nodes)) for first in range(0, size, nodes))
    listed = sorted(rank for node in nodes for rank in node)
    if listed != list(range(size)) or not all(nodes):
        raise InputError(f"nodes must hold each of the ranks 0 to {size - 1} once, none may be empty, got {nodes}")
    return tuple(sorted(tuple(sorted(node)) for node in nodes))


def check_links(nodes: Nodes, seats: Sequence[Seat]) -> None:
    """Raise InputError, on every rank, unless each link is over exactly the ranks of its node."""
    for node in nodes:
        ranks = [seats[rank].rank for rank in node]
        for rank in node:
            linked = seats[rank].linked
            if linked is not None and linked != ranks:
                raise InputError(
                    f"a link must be over the ranks of its node, got one over {linked} on rank {rank} "
                    f"of the node {ranks}: make it over a group of those, or give nodes"
                )
