"""Merge a Partial over the ranks. The only place of the core that communicates."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError, Unsupported
from ..group import Group
from ..partial import Partial, PartialSpec, spec_of
from .algorithms import ALGORITHMS, Algorithm, check_name, choose_algorithm, received_bytes
from .link import AssumedRanks, Link, process_group_of, ranks_of
from .shared_memory import SharedMemoryLink
from .symmetric import SymmetricLink, link_obstacle
from .two_level import TwoLevel, level_bytes

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AssumedRanks",
    "Link",
    "Reduction",
    "SharedMemoryLink",
    "SymmetricLink",
    "TwoLevel",
    "check_name",
    "check_no_gradient",
    "choose_algorithm",
    "level_bytes",
    "link_obstacle",
    "misfit",
    "process_group_of",
    "ranks_of",
    "received_bytes",
    "resolve_reduction",
    "run_reduction",
    "tree_reduce",
]


def tree_reduce(partial: Partial, group: Group | Link = None, *, algorithm: str = "auto") -> Partial:
    """Merge the partials of all ranks of `group`.

    Args:
        partial: this rank's, out `[B, T, H, D_v]` and lse `[B, T, H]`; the same shape, dtype and kind of device on
            every rank. `(0, -inf)` is a valid partial, on some ranks or on all.
        group: a process group, a 1-D DeviceMesh, or None for all ranks (this process alone if torch.distributed is not
            initialized); or a link: a SharedMemoryLink between CPU ranks, a SymmetricLink between GPUs of one host, a
            TwoLevel over several hosts. Any number of ranks.
        algorithm: one of `reduce.ALGORITHMS`, or "auto": the link's if it takes the partial, otherwise
            `choose_algorithm`.

    Returns:
        The merged Partial, the same bits on every rank ("all_reduce": if the backend's all-reduce is so; gloo's and
        NCCL's are). With "reduce_scatter" and "symmetric_scatter", rank r gets heads
        `r H / P .. (r + 1) H / P - 1` only.

    Raises:
        InputError: the algorithm is unknown, needs a link that was not passed or that is too small, or scatters heads
            that do not divide by the ranks; or this rank is not in the group.
        TreeAttentionError: another rank did not arrive at an earlier exchange over the link.
        Unsupported: the partial requires a gradient.

    Example:
        >>> out, lse = tree_reduce(Partial(out, lse), group, algorithm="reduce_scatter")
    """
    reduction = resolve_reduction(spec_of(partial), group, algorithm)
    check_no_gradient(reduction.world_size, *partial)
    return run_reduction(partial, reduction)


@dataclass(frozen=True)
class Reduction:
    """How partials are merged over the ranks, resolved from values that all ranks share.

    Attributes:
        algorithm: a name in `ALGORITHMS`.
        group: the process group; None for one process.
        rank, world_size: this rank and the number of ranks.
        link: the link that the algorithm runs over, if any.
        spec: shape, dtype and device of the partials.
        obstacles: algorithm -> why "auto" passed over it.
    """

    algorithm: str
    group: ProcessGroup | None
    rank: int
    world_size: int
    link: Link | None
    spec: PartialSpec
    obstacles: dict[str, str]

    @property
    def scatters(self) -> bool:
        """True if each rank gets its own heads only."""
        return ALGORITHMS[self.algorithm].scatters

    @property
    def received_bytes(self) -> float:
        """Bytes that the busiest rank receives."""
        return received_bytes(
            self.algorithm,
            rows=self.spec.rows(),
            head_dim=self.spec.shape[3],
            world_size=self.world_size,
            device_type=self.spec.device.type,
            itemsize=self.spec.dtype.itemsize,
            node_sizes=() if self.link is None else self.link.node_sizes,
        )


def resolve_reduction(spec: PartialSpec, group: Group | Link, algorithm: str) -> Reduction:
    """Check the request and choose the algorithm. No communication."""
    check_name(algorithm)
    process_group, rank, size = ranks_of(group)
    link = group if isinstance(group, Link) else None
    if algorithm != "auto":
        fault = misfit(algorithm, spec, group, size)
        if fault is None and ALGORITHMS[algorithm].link is not None and link is not None:
            fault = link.obstacle(spec)
        if fault is not None:
            raise InputError(f"{algorithm} {fault}")
    if link is not None and link.carrier is not link and algorithm in ("auto", *link.algorithms):
        return resolve_reduction(spec, link.carrier, "auto")
    obstacles = {}
    if algorithm == "auto":
        algorithm = choose_algorithm(spec.device.type, size)
        if link is not None and link.algorithms:
            obstacle = link.obstacle(spec)
            if obstacle is None:
                algorithm = link.algorithms[0]
            else:
                obstacles[link.algorithms[0]] = obstacle
    runs_over_link = ALGORITHMS[algorithm].link is not None
    return Reduction(algorithm, process_group, rank, size, link if runs_over_link else None, spec, obstacles)


def run_reduction(partial: Partial, reduction: Reduction) -> Partial:
    """Merge this rank's partial with the others' as `reduction` says."""
    if reduction.world_size == 1:
        return partial
    if reduction.link is not None:
        return reduction.link.reduce(partial, scatter=reduction.scatters)
    run = ALGORITHMS[reduction.algorithm].run
    if run is None or reduction.group is None:
        raise Unsupported(f"{reduction.algorithm} over AssumedRanks: pass a group or a link of ranks that exist")
    return run(partial, reduction.group)


def misfit(algorithm: str, spec: PartialSpec, group: Group | Link, world_size: int) -> str | None:
    """Return why the arguments do not fit an algorithm, whatever the size of the link; None if they do."""
    needed = ALGORITHMS[algorithm]
    if needed.scatters and spec.shape[2] % world_size:
        return f"needs heads that divide by the ranks, got {spec.shape[2]} heads and {world_size} ranks"
    if needed.link is not None and not (isinstance(group, Link) and algorithm in group.algorithms):
        return f"needs a {needed.link.__name__} as the group, got {type(group).__name__}"
    return None


def check_no_gradient(world_size: int, *tensors: Tensor) -> None:
    """Raise Unsupported if these require a gradient, which would have to pass from rank to rank."""
    requires_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if requires_grad and world_size > 1:
        raise Unsupported("the exchange between ranks has no gradient: call it under torch.no_grad()")
