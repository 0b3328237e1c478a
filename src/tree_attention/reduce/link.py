"""`Link`: what the three links have in common. A link takes the place of a group wherever one is expected."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError, Unsupported
from ..group import Group, rank_and_size, resolve_group
from ..partial import Partial, PartialSpec, empty
from .collectives import pack, unpack


class Link:
    """A faster way to merge partials over the ranks of `group` than its collectives."""

    group: ProcessGroup | None  # None for this process alone
    algorithms: tuple[str, ...] = ()  # that run over this link; "auto" takes the first
    node_sizes: tuple[int, ...] = ()  # ranks of each node; empty if this link knows no nodes

    @property
    def carrier(self) -> Link | ProcessGroup | None:
        """The link or group that partials travel over: this link, unless it only forwards to another."""
        return self

    def rank_and_size(self) -> tuple[int, int]:
        """Return this rank and the number of ranks."""
        return rank_and_size(self.group)

    def obstacle(self, spec: PartialSpec) -> str | None:
        """Return why this link cannot take a partial of this shape, dtype and device; None if it can."""
        return None

    def reduce(self, partial: Partial, *, scatter: bool = False) -> Partial:
        """Merge the partials of all ranks; the same bits on every rank.

        scatter: only if `algorithms` names one that scatters. Rank r gets heads `r H / P .. (r + 1) H / P - 1`.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise TreeAttentionError if an earlier exchange failed. Does not synchronize with the device."""


class NodeLink(Link):
    """A link that can also serve inside a node of a TwoLevel, where it exchanges slices of packed rows."""

    def merge_slices(self, pieces: Tensor, place: int) -> Tensor:
        """Merge slice `min(place, slices - 1)` of packed `[slices, rows, D_v + 1]` over the ranks of the node."""
        rows, slices = rows_of(pieces), len(pieces)
        if self.rank_and_size()[1] == slices:
            return pack(self.reduce(rows, scatter=True)).view_as(pieces[0])
        return pack(self.reduce(rows)).view_as(pieces)[min(place, slices - 1)]

    def gather_slices(self, mine: Tensor, place: int, slices: int) -> Tensor:
        """Gather the packed slices `[rows, D_v + 1]` of the first ranks to `[slices, rows, D_v + 1]` on every rank."""
        whole = pack(empty((slices, len(mine), mine.shape[-1] - 1), dtype=mine.dtype, device=mine.device))
        if place < slices:
            whole[place] = mine  # merging it with the others' empty rows does not change it
        return pack(self.reduce(rows_of(whole))).view_as(whole)


class AssumedRanks(Link):
    """Ranks that do not exist, for `explain` alone: what would happen on 8 GPUs, asked on a laptop.

    Args:
        world_size: number of ranks; this process is rank 0.
        link: the class of the link that they share; None for a plain process group. It takes any partial.
        node_sizes: number of ranks of each node, with `link=TwoLevel`.
    """

    def __init__(self, world_size: int, link: type[Link] | None = None, node_sizes: Sequence[int] = ()) -> None:
        if world_size < 1 or sum(node_sizes) not in (0, world_size):
            raise InputError(f"world_size must be at least 1 and the sum of node_sizes, got {world_size}, {node_sizes}")
        self.group, self.world_size = None, world_size
        self.algorithms, self.node_sizes = () if link is None else link.algorithms, tuple(node_sizes)

    def rank_and_size(self) -> tuple[int, int]:
        return 0, self.world_size

    def reduce(self, partial: Partial, *, scatter: bool = False) -> Partial:
        self.check()
        return partial

    def check(self) -> None:
        raise Unsupported("AssumedRanks only answer `explain`: pass a group or a link of ranks that exist")


Target = Group | Link  # what callers pass as `group`


def rows_of(pieces: Tensor) -> Partial:
    """View packed `[slices, rows, D_v + 1]` as a Partial `[1, 1, slices rows, D_v]`, a shape that links take."""
    return unpack(pieces.flatten(0, 1)[None, None])


def process_group_of(group: Target) -> ProcessGroup | None:
    """Return the process group of a group, a 1-D DeviceMesh, a link, or None; see `resolve_group`."""
    return group.group if isinstance(group, Link) else resolve_group(group)


def ranks_of(group: Target) -> tuple[ProcessGroup | None, int, int]:
    """Return (process group, this rank, number of ranks)."""
    process_group = process_group_of(group)
    return process_group, *(group.rank_and_size() if isinstance(group, Link) else rank_and_size(process_group))
