"""Process groups, and the votes by which their ranks agree: at set-up and with `verify=True`, not in decode steps.

Functions with `*groups` work over the product of several groups, such as the sequence axis and the tensor-parallel axis
of a mesh; None stands for an axis of one rank.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .errors import InputError, RanksDisagree

Group = ProcessGroup | DeviceMesh | None
Item = TypeVar("Item")


def resolve_group(group: Group = None) -> ProcessGroup | None:
    """Return the process group of a group or a 1-D DeviceMesh; None means all ranks.

    The result is None if torch.distributed is not initialized: this process alone. Raises InputError if this rank is
    not a member.
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
    """Return this rank within the group and the number of ranks; (0, 1) without a group."""
    return (0, 1) if group is None else (group.rank(), group.size())


def gather_objects(mine: Item, *groups: ProcessGroup | None) -> list[Item]:
    """Return the objects of all ranks, the same list on each: in rank order, the first group varying fastest."""
    gathered = [mine]
    for group in groups:
        if group is not None and group.size() > 1:
            by_rank = [gathered] * group.size()
            dist.all_gather_object(by_rank, gathered, group=group)
            gathered = [item for items in by_rank for item in items]
    return gathered


def first_fault(fault: str | None, *groups: ProcessGroup | None) -> str | None:
    """Return the first rank's fault, None if no rank has one. All ranks get the same answer and can raise together."""
    return next((text for text in gather_objects(fault, *groups) if text), None)


def broadcast_from_first(value: Item, *groups: ProcessGroup | None) -> Item:
    """Return the object of the rank that is first in every group."""
    values = [value]
    for group in groups:
        if group is not None:
            dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def check_agreement(described: Mapping[str, object], group: ProcessGroup | None, *, error: str | None = None) -> None:
    """Raise RanksDisagree on every rank unless all ranks describe the same call and none reports an error.

    described: name -> value that must be equal on all ranks; values are compared as text. error: a fault that this rank
    found by itself; if it raised alone, it would leave the others waiting.
    """
    votes = gather_objects(({name: str(value) for name, value in described.items()}, error), group)
    if text := disagreement(votes):
        raise RanksDisagree(text)


def disagreement(votes: Sequence[tuple[Mapping[str, str], str | None]]) -> str | None:
    """Return how the (described, error) of the ranks differ, or which ranks have an error; None if they agree."""
    failed = {rank: error for rank, (_, error) in enumerate(votes) if error}
    if failed:
        return "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
    for name in sorted({name for values, _ in votes for name in values}):
        values = {rank: values.get(name) for rank, (values, _) in enumerate(votes)}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in values.items())
            return f"{name} must be the same on every rank, got {listed}"
    return None
