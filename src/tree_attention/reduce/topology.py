"""`TwoLevel`: which ranks are near each other, found once; what the two-level reduction goes by."""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..errors import InputError
from ..group import Group, check_agreement, gather_objects, rank_and_size, resolve_group
from ..partial import Partial
from .shared_memory import SharedMemoryLink
from .symmetric import SymmetricLink

Nodes = tuple[tuple[int, ...], ...]


class TwoLevel:
    """The ranks of a group by nodes; pass it where a group is taken. All ranks of `group` make it together, once.

    Ranks of one node are near each other, nodes are far apart. Between nodes only one merged partial a node travels,
    cut into slices: slice i is exchanged by the i-th ranks of all nodes. There are as many slices as the smallest
    node has ranks; in a larger node the ranks past those hand in their partial and get the result, no more. So with
    8 + 8 + 1 ranks one rank a node faces the network. `nodes` may also cut a host into several nodes, 8 + 4 ranks as
    4 + 4 + 4, and then all ranks do.

    Args:
        group: a process group, a 1-D DeviceMesh, or None for all ranks.
        nodes: the ranks (of the group) of each node; or an int, that many neighbouring ranks a node; or None: by host
            name, and where GPUs of a host cannot access each other's memory, by who can.
        link: a link over exactly this rank's node, for the exchanges inside it; on every rank or on none. Without,
            the group's point-to-point calls (NCCL, gloo). A partial too large for it goes without.

    Attributes:
        nodes: tuple of tuples of ranks, each ascending, in the order of their first ranks.
        peers: the ranks of this rank's node; place: which of them this rank is.
        slices: in how many slices a partial is cut, see above.

    Raises:
        InputError: on every rank, if `nodes` does not hold each rank of the group once, or is not the nodes that the
            links are over; a group this rank is not in.
        RanksDisagree: on every rank, if `nodes` or the kind of link differs between ranks.
    """

    def __init__(
        self,
        group: Group = None,
        nodes: int | Sequence[Sequence[int]] | None = None,
        *,
        link: SharedMemoryLink | SymmetricLink | None = None,
    ) -> None:
        self.group, self.link = resolve_group(group), link
        rank, size = rank_and_size(self.group)
        check_agreement({"nodes": nodes, "link": type(link).__name__}, self.group)
        given = None if nodes is None else _partition(nodes, size)  # all ranks raise, or none
        seats = gather_objects(_seat(link), self.group)
        self.nodes: Nodes = given or found_nodes(seats)
        _check_links(self.nodes, seats)
        self.peers = next(node for node in self.nodes if rank in node)
        self.place = self.peers.index(rank)
        self.slices = min(map(len, self.nodes))

    def fits(self, partial: Partial) -> bool:
        """True: every partial can be handed in."""
        return True


class Seat(NamedTuple):
    """Where a rank sits. device: its GPU, "" if it has none. reach: the GPUs whose memory that GPU can access, None if
    it is the only one that this process sees. linked: the (global) ranks of its link, None without one."""

    rank: int
    host: str
    device: str
    reach: tuple[str, ...] | None
    linked: tuple[int, ...] | None


def found_nodes(seats: Sequence[Seat]) -> Nodes:
    """The nodes: a rank joins the first node whose first rank is on its host and in its GPU's reach."""
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


def _partition(nodes: int | Sequence[Sequence[int]], size: int) -> Nodes:
    if isinstance(nodes, int):
        if nodes < 1 or size % nodes:
            raise InputError(f"nodes of {nodes} ranks need a number of ranks that divides by it, got {size}")
        return tuple(tuple(range(first, first + nodes)) for first in range(0, size, nodes))
    listed = sorted(rank for node in nodes for rank in node)
    if listed != list(range(size)) or not all(nodes):
        raise InputError(f"nodes must hold each of the ranks 0 to {size - 1} once, none may be empty, got {nodes}")
    return tuple(sorted(tuple(sorted(node)) for node in nodes))


def _check_links(nodes: Nodes, seats: Sequence[Seat]) -> None:
    """From what all ranks know of each other, so that all raise."""
    for node in nodes:
        ranks = tuple(seats[rank].rank for rank in node)
        for rank in node:
            linked = seats[rank].linked
            if linked is not None and linked != ranks:
                raise InputError(
                    f"a link must be over the ranks of its node, got one over {list(linked)} on rank {rank} "
                    f"of the node {list(ranks)}: make it over a group of those, or give nodes"
                )


def _seat(link: SharedMemoryLink | SymmetricLink | None) -> Seat:
    rank = dist.get_rank() if dist.is_initialized() else 0
    linked = None
    if link is not None:
        linked = (rank,) if link.group is None else tuple(dist.get_process_group_ranks(link.group))
    device, reach = "", None
    if torch.cuda.is_available():
        names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        here = torch.cuda.current_device()
        device = names[here]
        if len(names) > 1:  # else it cannot be told
            reach = tuple(n for i, n in enumerate(names) if i == here or torch.cuda.can_device_access_peer(here, i))
    return Seat(rank, socket.gethostname(), device, reach, linked)
