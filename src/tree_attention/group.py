"""Process groups, and the votes by which their ranks agree: at set-up and with `verify=True`, not in decode steps.

Functions with `*groups` work over the product of several groups, such as the sequence axis and the tensor-parallel axis
of a mesh; None stands for an axis of one rank.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

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


def gather_values(mine: Item, *groups: ProcessGroup | None) -> list[Item]:
    """Return the JSON values of all ranks, the same list on each: in rank order, the first group varying fastest.

    No rank runs what another one sends, as it would with pickle. JSON turns tuples into lists.
    """
    gathered = [mine]
    for group in groups:
        if group is not None and group.size() > 1:
            data = _encoded(gathered, group)
            own_size = torch.tensor([data.numel()], device=data.device)
            sizes = [torch.empty_like(own_size) for _ in range(group.size())]
            dist.all_gather(sizes, own_size, group=group)
            longest = max(map(int, sizes))
            by_rank = [data.new_empty(longest) for _ in sizes]
            dist.all_gather(by_rank, pad(data, (0, longest - data.numel())), group=group)
            gathered = [item for data, size in zip(by_rank, sizes, strict=True) for item in _decoded(data[: int(size)])]
    return gathered


def _encoded(value: object, group: ProcessGroup) -> Tensor:
    """JSON as uint8, on the device that the group communicates from."""
    on_cpu = "gloo" in str(dist.get_backend_config(group))
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return data if on_cpu else data.cuda()


def _decoded(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


def first_fault(fault: str | None, *groups: ProcessGroup | None) -> str | None:
    """Return the first rank's fault, None if no rank has one. All ranks get the same answer and can raise together."""
    return next((text for text in gather_values(fault, *groups) if text), None)


def broadcast_from_first(value: Item, *groups: ProcessGroup | None) -> Item:
    """Return the JSON value of the rank that is first in every group."""
    for group in groups:
        if group is not None and group.size() > 1:
            data = _encoded(value, group)
            size = torch.tensor([data.numel()], device=data.device)
            dist.broadcast(size, group=group, group_src=0)
            data = data if group.rank() == 0 else data.new_empty(int(size))
            dist.broadcast(data, group=group, group_src=0)
            value = _decoded(data)
    return value


def check_agreement(described: Mapping[str, object], group: ProcessGroup | None, *, error: str | None = None) -> None:
    """Raise RanksDisagree on every rank unless all ranks describe the same call and none reports an error.

    described: name -> value that must be equal on all ranks; values are compared as text. error: a fault that this rank
    found by itself; if it raised alone, it would leave the others waiting.
    """
    votes = gather_values(({name: str(value) for name, value in described.items()}, error), group)
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
