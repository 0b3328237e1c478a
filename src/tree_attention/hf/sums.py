"""Sums over the ranks of a tensor-parallel model, two a layer: through a SymmetricLink, where its GPUs can have one.

The merge of Partials with equal log-sum-exps is the mean. Links are kept by the name of their group, as torch keeps
groups, since a compiled step has no objects; they end with it (step.py).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import Unavailable
from ..partial import Partial
from ..reduce import SymmetricLink
from .placement import PATIENCE_S

ROWS, WIDTH = 4096, 128
_links: dict[str, tuple[SymmetricLink, Tensor]] = {}


def open_link(group: ProcessGroup) -> None:
    """All ranks of the group together; without peer access between them there is none."""
    if linked_name(group) is not None:
        return
    try:
        link = SymmetricLink(group, rows=ROWS, head_dim=WIDTH, timeout_s=PATIENCE_S)
    except Unavailable:  # on every rank alike
        return
    _links[_name(group)] = link, torch.zeros(ROWS, device=link.device)


def close_links(group: ProcessGroup | None) -> None:
    """Of a group that ends; None: of all groups."""
    if group is None or group == torch.distributed.group.WORLD:
        _links.clear()
    else:
        _links.pop(_name(group), None)


def linked_name(group: ProcessGroup | None) -> str | None:
    """The name of a group, if there is a link between its ranks."""
    known = None if group is None else _links.get(_name(group))
    return _name(group) if known is not None and known[0].group is group else None


def ranks_of(group_name: str) -> int:
    """How many are linked."""
    return _links[group_name][0].world_size


def _name(group: Any) -> str:
    return group.group_name


def fits(numbers: Tensor) -> bool:
    """Whether there is room for them."""
    return numbers.is_floating_point() and numbers.numel() <= ROWS * math.gcd(numbers.shape[-1], WIDTH)


def mean_over_ranks(x: Tensor, group_name: str) -> Tensor:
    """The mean of float32 x, which `fits`, over the ranks of a group; the same bits on all."""
    link, equal = _links[group_name]
    rows = x.reshape(1, 1, -1, math.gcd(x.shape[-1], WIDTH))
    return link.reduce(Partial(rows, equal[: rows.shape[2]].view(rows.shape[:3]))).out.view(x.shape)
