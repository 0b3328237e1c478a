"""Nodes: which ranks are near each other, found by host name and by which GPUs can access each other's memory."""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..errors import InputError
from .link import Link

Nodes = tuple[tuple[int, ...], ...]


class Seat(NamedTuple):
    """Where a rank runs."""

    rank: int  # global
    host: str
    device: str  # its GPU, "" if it has none
    reach: tuple[str, ...] | None  # the GPUs whose memory its GPU can access; None if this process sees only one GPU
    linked: tuple[int, ...] | None  # the global ranks of its link, None without a link


def own_seat(link: Link | None) -> Seat:
    """Return where this process runs."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    linked = None
    if link is not None:
        linked = (rank,) if link.group is None else tuple(dist.get_process_group_ranks(link.group))
    device, reach = "", None
    if torch.cuda.is_available():
        names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        here = torch.cuda.current_device()
        device = names[here]
        if len(names) > 1:  # with one visible GPU, peer access is unknown
            reach = tuple(n for i, n in enumerate(names) if i == here or torch.cuda.can_device_access_peer(here, i))
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
        ranks = tuple(seats[rank].rank for rank in node)
        for rank in node:
            linked = seats[rank].linked
            if linked is not None and linked != ranks:
                raise InputError(
                    f"a link must be over the ranks of its node, got one over {list(linked)} on rank {rank} "
                    f"of the node {list(ranks)}: make it over a group of those, or give nodes"
                )
