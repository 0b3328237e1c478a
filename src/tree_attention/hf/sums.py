"""Sums over the ranks of a tensor-parallel model, two a layer: through a SymmetricLink, where its GPUs can have one.

The merge of Partials with equal log-sum-exps is the mean. Links are kept by the name of their group, as torch keeps
groups, since a compiled step has no objects; they end with it (step.py). A step's exchanges, of sums and of attention,
follow each other on one stream, so none keeps another out.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import Unavailable
from ..partial import Partial
from ..reduce import SymmetricLink
from .placement import PATIENCE_S
from .tensor import tensor_group

ROWS, WIDTH = 2048, 128  # of 2 ranks; more have fewer rows: above that NCCL is faster (computed, by cost/mesh.py)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_links: dict[str, tuple[SymmetricLink, Tensor]] = {}


def open_link(model: Any) -> str | None:
    """The name of the group that a model is split over, if its ranks are linked. All together: it is made here."""
    group = tensor_group(model)
    if group is None or model.device.type != "cuda":
        return None
    name = cast(Any, group).group_name
    if name in _links and _links[name][0].group is group:
        return name
    try:
        link = SymmetricLink(group, rows=ROWS, head_dim=WIDTH, timeout_s=PATIENCE_S)
    except Unavailable:  # on every rank alike
        return None
    _links[name] = link, torch.zeros(ROWS, device=link.device)
    return name


def close_links(group: Any) -> None:
    """Of a group that ends; None: of all groups."""
    for name, (link, _) in list(_links.items()):
        if group in (None, torch.distributed.group.WORLD, link.group):
            del _links[name]


def ranks_of(group_name: str) -> int:
    """How many are linked."""
    return _links[group_name][0].world_size


def fits(numbers: Tensor, ranks: int) -> bool:
    """Whether a link takes them, and is faster."""
    if numbers.dtype not in DTYPES or numbers.ndim == 0:
        return False
    return numbers.numel() * (ranks - 1) <= ROWS * math.gcd(numbers.shape[-1], WIDTH)


def mean_over_ranks(x: Tensor, group_name: str) -> Tensor:
    """The mean of float32 x, which `fits`, over the ranks of a group; the same bits on all."""
    link, equal = _links[group_name]
    rows = x.reshape(1, 1, -1, math.gcd(x.shape[-1], WIDTH))
    return link.reduce(Partial(rows, equal[: rows.shape[2]].view(rows.shape[:3]))).out.view(x.shape)
