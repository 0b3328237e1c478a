"""Merge a Partial over the ranks. The only place of the core that communicates.

docs/math.md lists the bytes that each algorithm sends beside the paper's formulas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError, Unsupported
from ..group import Group
from ..partial import Partial, PartialSpec, spec_of
from .collectives import all_gather, all_reduce, recursive_doubling, reduce_scatter
from .link import AssumedRanks, Link, Target, process_group_of, ranks_of
from .shared_memory import SharedMemoryLink
from .symmetric import SymmetricLink, link_obstacle
from .two_level import TwoLevel, level_bytes

__all__ = ["AssumedRanks", "SharedMemoryLink", "TwoLevel", "link_obstacle", "process_group_of", "tree_reduce"]


@dataclass(frozen=True)
class Algorithm:
    # (P, n = bytes of a packed partial, D_v) -> bytes that the busiest rank receives; None: see `level_bytes`
    received: Callable[[int, int, int], float] | None
    run: Callable[[Partial, ProcessGroup], Partial] | None = None  # None if it runs over a link
    link: type[Link] | None = None  # the class of link that it needs
    scatters: bool = False  # each rank gets its own heads only


ALGORITHMS = {
    "all_gather": Algorithm(lambda P, n, _: (P - 1) * n, all_gather),  # 1 all-gather
    # 3 all-reduces, Algorithm 3 of the paper
    "all_reduce": Algorithm(lambda P, n, D_v: 2 * (P - 1) / P * (n // (D_v + 1) * (D_v + 2)), all_reduce),
    "tree": Algorithm(lambda P, n, _: (P - 1).bit_length() * n, recursive_doubling),  # exchanges in pairs
    "reduce_scatter": Algorithm(lambda P, n, _: (P - 1) / P * n, reduce_scatter, scatters=True),  # 1 all-to-all
    # no collective, but packets: each 4 bytes travel with an epoch of 4 bytes
    "shared_memory": Algorithm(lambda P, n, _: 2 * (P - 1) * n, link=SharedMemoryLink),
    "symmetric": Algorithm(lambda P, n, _: 2 * (P - 1) * n, link=SymmetricLink),
    "symmetric_scatter": Algorithm(lambda P, n, _: 2 * (P - 1) / P * n, link=SymmetricLink, scatters=True),
    "two_level": Algorithm(None, link=TwoLevel),
}


def tree_reduce(partial: Partial, group: Group | Link = None, *, algorithm: str = "auto") -> Partial:
    """Merge the partials of all ranks of `group`.

    Args:
        partial: this rank's, out `[B, T, H, D_v]` and lse `[B, T, H]`; the same shape, dtype and kind of device on
            every rank. `(0, -inf)` is a valid partial, on some ranks or on all.
        group: as in `tree_decode`. Any number of ranks; this process alone if torch.distributed is not initialized.
        algorithm: one of `reduce.ALGORITHMS`, or "auto": the link's if it takes the partial, otherwise
            `choose_algorithm`.

    Returns:
        The merged Partial, the same bits on every rank ("all_reduce": if the backend's all-reduce is so; gloo's and
        NCCL's are). With "reduce_scatter" and "symmetric_scatter", rank r gets heads `r H / P .. (r + 1) H / P - 1`.

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
    """How partials are merged over the ranks, resolved from values that all ranks share."""

    exchange: str  # the entry of ALGORITHMS by which partials are exchanged
    group: ProcessGroup | None  # None for one process
    rank: int
    world_size: int
    link: Link | None  # the link that the exchange runs over, if any
    spec: PartialSpec
    algorithm_obstacles: dict[str, str]  # algorithm -> why "auto" passed over it

    @property
    def scatters(self) -> bool:
        """True if each rank gets its own heads only."""
        return ALGORITHMS[self.exchange].scatters

    @property
    def received_bytes(self) -> float:
        """Bytes that the busiest rank receives."""
        spec, sizes = self.spec, () if self.link is None else self.link.node_sizes
        how: Any = {"rows": spec.rows(), "head_dim": spec.shape[3], "world_size": self.world_size}
        return received_bytes(self.exchange, **how, itemsize=spec.dtype.itemsize, node_sizes=sizes)


def resolve_reduction(spec: PartialSpec, group: Target, algorithm: str = "auto") -> Reduction:
    """Return how `tree_reduce` merges partials like `spec`; raises what it would raise. No communication."""
    check_name(algorithm, ALGORITHMS)
    return Reduction(*choose_exchange(spec, group, ranks_of(group), algorithm))


def choose_exchange(spec: PartialSpec, group: Target, ranks: tuple[Any, ...], algorithm: str) -> tuple[Any, ...]:
    """Choose the algorithm; return the fields of a Reduction, so that a decode step builds a Route and nothing else."""
    link = group if isinstance(group, Link) else None
    if link is not None and algorithm in ("auto", *link.algorithms) and link.carrier is not link:
        return choose_exchange(spec, link.carrier, ranks_of(link.carrier), "auto")
    without_link = choose_algorithm(spec.device.type, ranks[2])
    preferred = without_link if link is None or not link.algorithms else link.algorithms[0]
    chosen = preferred if algorithm == "auto" else algorithm
    obstacle = reduction_obstacle(chosen, spec, group)
    if obstacle is not None and algorithm != "auto":
        raise InputError(f"{algorithm} {obstacle}")
    obstacles = {} if obstacle is None else {chosen: obstacle}
    chosen = chosen if obstacle is None else without_link
    return chosen, *ranks, None if ALGORITHMS[chosen].link is None else link, spec, obstacles


def run_reduction(partial: Partial, reduction: Reduction) -> Partial:
    """Merge this rank's partial with the others' as `reduction` says."""
    if reduction.world_size == 1:
        return partial
    if reduction.link is not None:
        return reduction.link.reduce(partial, scatter=reduction.scatters)
    run = ALGORITHMS[reduction.exchange].run
    if run is None or reduction.group is None:
        raise Unsupported("AssumedRanks only answer `explain`: pass a group or a link of ranks that exist")
    return run(partial, reduction.group)


def reduction_obstacle(algorithm: str, spec: PartialSpec, group: Target) -> str | None:
    """Return why an algorithm cannot merge partials like `spec` over `group`; None if it can."""
    obstacle = misfit(algorithm, spec, group)
    needs_link = ALGORITHMS[algorithm].link is not None
    return group.obstacle(spec) if obstacle is None and needs_link and isinstance(group, Link) else obstacle


def misfit(algorithm: str, spec: PartialSpec, group: Target) -> str | None:
    """Return why the heads or the kind of group do not fit an algorithm; None if they do."""
    needed = ALGORITHMS[algorithm]
    if needed.scatters and spec.shape[2] % (world_size := ranks_of(group)[2]):
        return f"needs heads that divide by the ranks, got {spec.shape[2]} heads and {world_size} ranks"
    if needed.link is not None and not (isinstance(group, Link) and algorithm in group.algorithms):
        return f"needs a {needed.link.__name__} as the group, got {type(group).__name__}"
    return None


def check_no_gradient(world_size: int, *tensors: Tensor) -> None:
    """Raise Unsupported if these require a gradient, which would have to pass from rank to rank."""
    if world_size > 1 and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise Unsupported("the exchange between ranks has no gradient: call it under torch.no_grad()")


def check_name(algorithm: str, names: Sequence[str] | dict[str, Algorithm]) -> None:
    """Raise InputError unless `algorithm` is "auto" or one of `names`."""
    if algorithm not in (*names, "auto"):
        raise InputError(f"algorithm must be 'auto' or one of {', '.join(names)}, got {algorithm!r}")


def choose_algorithm(device_type: str, world_size: int, *, linked: bool = False, nodes: int = 1) -> str:
    """Return the algorithm that "auto" stands for, from values that all ranks share.

    linked: True if there is a link that takes the partial. nodes: number of nodes of a TwoLevel. Without these,
    "all_gather" on CUDA, one NCCL launch, and "tree" on the CPU, where gloo's point-to-point calls wake fewer threads.
    """
    if nodes > 1:
        return "two_level"
    if linked:
        return "symmetric" if device_type == "cuda" else "shared_memory"
    return "all_gather" if device_type == "cuda" or world_size == 1 else "tree"


def received_bytes(
    algorithm: str,
    *,
    rows: int,
    head_dim: int,
    world_size: int,
    device_type: str = "cpu",
    itemsize: int = 4,
    node_sizes: Sequence[int] = (),
) -> float:
    """Return the bytes that the busiest rank receives in one `tree_reduce` of `rows = B T H` rows of `head_dim = D_v`.

    device_type: what "auto" is resolved with. itemsize: bytes per element. node_sizes: number of ranks of each node,
    for "two_level" and "auto"; with fewer than two nodes both are resolved as for a plain group.
    """
    check_name(algorithm, ALGORITHMS)
    if algorithm == "auto" or (algorithm == "two_level" and len(node_sizes) < 2):
        algorithm = choose_algorithm(device_type, world_size, nodes=len(node_sizes))
    received = ALGORITHMS[algorithm].received
    if received is None:
        return sum(level_bytes(rows=rows, head_dim=head_dim, node_sizes=node_sizes, itemsize=itemsize))
    return received(world_size, rows * (head_dim + 1) * itemsize, head_dim)
