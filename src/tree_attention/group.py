"""The ranks that share one sequence: who they are, and the vote that they were all called alike."""

from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .errors import InputError, RanksDisagree

Group = ProcessGroup | DeviceMesh | None
Item = TypeVar("Item")


def resolve_group(group: Group = None) -> ProcessGroup | None:
    """The process group behind a group, a 1-D DeviceMesh, or None: all ranks, or None if nothing is initialised.

    Raises InputError if this rank is not in the group or the mesh has more than one axis.
    """
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(f"mesh must have 1 axis, got {group.ndim}: pass mesh[name], names {group.mesh_dim_names}")
        if group.get_coordinate() is None:
            raise InputError(f"this rank ({dist.get_rank()}) is not in the mesh {group}: only its members may call")
        return group.get_group()
    if not isinstance(group, ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise InputError(f"this rank ({dist.get_rank()}) is not in the group: only its members may call")
        raise InputError(f"group must be a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__}")
    return group


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """This rank within the group, and the number of ranks in it; (0, 1) without a group."""
    return (0, 1) if group is None else (group.rank(), group.size())


def gather_objects(mine: Item, group: ProcessGroup | None) -> list[Item]:
    """What each rank hands in, in rank order; for set-up, not for steps."""
    of_ranks = [mine]
    if group is not None and group.size() > 1:
        of_ranks *= group.size()
        dist.all_gather_object(of_ranks, mine, group=group)
    return of_ranks


def first_fault(fault: str | None, group: ProcessGroup | None) -> str | None:
    """The text of the first rank that has one, on every rank alike, so that none goes on or raises alone."""
    return next((text for text in gather_objects(fault, group) if text), None)


def check_agreement(described: Mapping[str, object], group: ProcessGroup | None, *, error: str | None = None) -> None:
    """Raise on every rank alike unless all ranks describe the same thing and none reports an error.

    described: name -> value that must be equal on all ranks; compared as text.
    error: what this rank found wrong by itself, so that it need not raise alone and leave the others waiting.
    One small collective of Python objects: for set-up and `verify=True`, not for every step.
    """
    votes = gather_objects(({name: str(value) for name, value in described.items()}, error), group)
    failed = {rank: error for rank, (_, error) in enumerate(votes) if error}
    if failed:
        raise RanksDisagree("; ".join(f"rank {rank}: {text}" for rank, text in failed.items()))
    for name in sorted({name for values, _ in votes for name in values}):
        values = {rank: values.get(name) for rank, (values, _) in enumerate(votes)}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in values.items())
            raise RanksDisagree(f"{name} must be the same on every rank, got {listed}")
