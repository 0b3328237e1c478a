"""Sums over the ranks of a tensor-parallel model, two per layer, through a SymmetricLink if the GPUs support one.

The merge of Partials with equal log-sum-exps is their mean. A compiled step cannot refer to objects, so links are kept
by the name of their group, and end with it (step.py). All exchanges of a step run one after the other on one stream.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import Unavailable
from ..partial import Partial
from ..reduce import SymmetricLink
from .exchange import TIMEOUT_S
from .tensor_parallel import tensor_group

ROWS, WIDTH = 2048, 128  # for 2 ranks, fewer rows for more ranks: above that NCCL is faster (computed, cost/mesh.py)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_links: dict[str, tuple[SymmetricLink, Tensor]] = {}


def open_link(model: Any) -> str | None:
    """Link the ranks that a model is split over; return their group's name, or None without a link. Collective."""
    group = tensor_group(model)
    if group is None or model.device.type != "cuda":
        return None
    name = cast(Any, group).group_name
    if name in _links and _links[name][0].group is group:
        return name
    try:
        link = SymmetricLink(group, rows=ROWS, head_dim=WIDTH, timeout_s=TIMEOUT_S)
    except Unavailable:  # on every rank alike
        return None
    _links[name] = link, torch.zeros(ROWS, device=link.device)
    return name


def close_links(group: Any) -> None:
    """Drop the link of a group that is about to end; None: the links of all groups."""
    for name, (link, _) in list(_links.items()):
        if group in (None, torch.distributed.group.WORLD, link.group):
            del _links[name]


def stop_links(group: Any) -> None:
    """End what waits on the GPU for a rank of this group that failed."""
    for link, _ in list(_links.values()):
        if link.group is group:
            link.stop_waiting()


def link_size(group_name: str) -> int:
    """Number of ranks that the link of a group connects."""
    return _links[group_name][0].world_size


def fits(numbers: Tensor, ranks: int) -> bool:
    """Return whether a link between `ranks` ranks can sum these numbers, and is faster than NCCL."""
    if numbers.dtype not in DTYPES or numbers.ndim == 0:
        return False
    return numbers.numel() * (ranks - 1) <= ROWS * math.gcd(numbers.shape[-1], WIDTH)


def mean_over_ranks(x: Tensor, group_name: str) -> Tensor:
    """Return the mean of x over the ranks of a group, the same bits on each. x: float32, and `fits` is true of it."""
    link, equal = _links[group_name]
    rows = x.reshape(1, 1, -1, math.gcd(x.shape[-1], WIDTH))
    return link.reduce(Partial(rows, equal[: rows.shape[2]].view(rows.shape[:3]))).out.view(x.shape)
