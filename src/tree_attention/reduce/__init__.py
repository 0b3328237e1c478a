"""A Partial on every rank -> one. The only place of the core that communicates.

                 collectives                     bytes a rank receives, n = rows (D_v + 1) 4       result
all_gather       1 all-gather, packed            (P - 1) n                                         all heads
all_reduce       3 all-reduces (Algorithm 3)     2 (P - 1) / P rows (D_v + 2) 4                    all heads
tree             ceil(log2 P) exchanges          ceil(log2 P) n                                    all heads
reduce_scatter   1 all-to-all, packed            (P - 1) / P n                                     H / P heads
shared_memory    none: a push, and a read        2 (P - 1) n                                       all heads
symmetric        none: one kernel, over NVLink   2 (P - 1) n                                       all heads
symmetric_scatter  the same                      2 (P - 1) / P n                                   H / P heads
two_level        3 exchanges, 1 of them across   inside (L + S - 2) / S n, across (N - 1) / S n    all heads

P ranks; rows = B T H; float32; two_level: N nodes, L ranks in the largest, S in the smallest. docs/math.md has these
beside the paper's formulas. With P not a power of two, the last of tree's exchanges waits for two others (tree.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError, Unsupported
from ..group import Group, rank_and_size, resolve_group
from ..partial import Partial, merge
from .collectives import all_gather, all_reduce, pack, reduce_scatter, unpack
from .shared_memory import SharedMemoryLink
from .symmetric import SymmetricLink
from .topology import TwoLevel
from .tree import tree
from .two_level import level_bytes, two_level

__all__ = [
    "ALGORITHMS", "Link", "SharedMemoryLink", "SymmetricLink", "TwoLevel", "check_no_gradient", "check_reduction",
    "choose_algorithm", "level_bytes", "received_bytes", "tree_reduce",
]  # fmt: skip

Link = SharedMemoryLink | SymmetricLink | TwoLevel
ALGORITHMS = (
    "all_gather", "all_reduce", "tree", "reduce_scatter", "shared_memory", "symmetric", "symmetric_scatter",
    "two_level",
)  # fmt: skip
LINKED = {
    "shared_memory": SharedMemoryLink, "symmetric": SymmetricLink, "symmetric_scatter": SymmetricLink,
    "two_level": TwoLevel,
}  # fmt: skip


def tree_reduce(partial: Partial, group: Group | Link = None, *, algorithm: str = "auto") -> Partial:
    """Merge the partials of all ranks of `group`.

    Args:
        partial: this rank's, out `[B, T, H, D_v]` and lse `[B, T, H]`; the same shape, dtype and kind of device on
            every rank. `(0, -inf)` is a legal partial, on some ranks or on all.
        group: a process group, a 1-D DeviceMesh, or None for all ranks (without an initialised process group:
            this process alone); or a link over a process group: a SharedMemoryLink between CPU ranks, a SymmetricLink
            between GPUs of one host, a TwoLevel over several hosts. Any number of ranks.
        algorithm: one of `ALGORITHMS`, or "auto": what `choose_algorithm` says.

    Returns:
        The merged Partial, the same bits on every rank ("all_reduce": as far as the backend's all-reduce gives them;
        gloo's and NCCL's do). With "reduce_scatter" and "symmetric_scatter" rank r keeps heads
        `r H / P .. (r + 1) H / P - 1` only.

    Raises:
        InputError: an unknown algorithm, a group this rank is not in, heads that do not divide by the ranks where each
            is to get its own, an algorithm that needs a link without one or with more than it has room for.
        TreeAttentionError: another rank did not arrive at an earlier exchange over the link.
        Unsupported: a partial that requires a gradient.
    """
    process_group = check_reduction(partial, group, algorithm)
    if process_group is None or process_group.size() == 1:
        return partial
    check_no_gradient(process_group, *partial)
    nodes = len(group.nodes) if isinstance(group, TwoLevel) else 1
    if isinstance(group, TwoLevel) and nodes == 1 and algorithm in ("auto", "two_level"):
        return tree_reduce(partial, group.group if group.link is None else group.link)
    link = group if isinstance(group, Link) and group.fits(partial) else None
    if algorithm == "auto":
        algorithm = choose_algorithm(
            partial.out.device.type, process_group.size(), linked=link is not None, nodes=nodes
        )
    if isinstance(link, TwoLevel) and algorithm == "two_level":
        return two_level(partial, link, process_group)
    if isinstance(link, SharedMemoryLink) and algorithm == "shared_memory":
        return merge(unpack(link.gather(pack(partial))))
    if isinstance(link, SymmetricLink) and algorithm in LINKED:
        return link.reduce(partial, scatter=algorithm == "symmetric_scatter")
    match algorithm:
        case "all_gather":
            return all_gather(partial, process_group)
        case "all_reduce":
            return all_reduce(partial, process_group)
        case "tree":
            return tree(partial, process_group)
        case _:
            return reduce_scatter(partial, process_group, dim=2)


def check_reduction(partial: Partial, group: Group | Link, algorithm: str) -> ProcessGroup | None:
    """The process group behind `group`, or what `tree_reduce` raises; no communication."""
    _check_algorithm(algorithm)
    process_group = group.group if isinstance(group, Link) else resolve_group(group)
    check_scatter(partial.out.shape[2], process_group, algorithm)
    needed = LINKED.get(algorithm)
    if needed is not None:
        if not isinstance(group, Link) or not isinstance(group, needed):
            raise InputError(f"{algorithm} needs a {needed.__name__} as the group, got {type(group).__name__}")
        if not isinstance(group, TwoLevel) and not group.fits(partial):
            raise InputError(f"{algorithm} {group.limit(partial)}")
    return process_group


def check_no_gradient(process_group: ProcessGroup | None, *tensors: Tensor) -> None:
    """Raise Unsupported if these ask for a gradient, which would have to pass from rank to rank."""
    asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if asked and rank_and_size(process_group)[1] > 1:
        raise Unsupported("the exchange between ranks has no gradient: call it under torch.no_grad()")


def check_scatter(heads: int, process_group: ProcessGroup | None, algorithm: str) -> None:
    """Where each rank is to get its own heads, there must be as many for each."""
    size = rank_and_size(process_group)[1]
    if algorithm.endswith("scatter") and heads % size:
        raise InputError(f"{algorithm} needs heads that divide by the ranks, got {heads} heads and {size} ranks")


def choose_algorithm(device_type: str, world_size: int, *, linked: bool = False, nodes: int = 1) -> str:
    """What "auto" stands for; only from values that all ranks share.

    nodes: of a TwoLevel that is passed as the group; "two_level" if there are several, otherwise what its one node
    would take. linked: there is a link that can take the partial; then that. Otherwise "all_gather" on CUDA, one
    collective and one NCCL launch, and "tree" on the CPU, where gloo's point-to-point calls wake fewer threads than its
    collectives do (figures in docs/log.md).
    """
    if nodes > 1:
        return "two_level"
    if linked:
        return "symmetric" if device_type == "cuda" else "shared_memory"
    return "all_gather" if device_type == "cuda" or world_size == 1 else "tree"


def received_bytes(
    algorithm: str, *, rows: int, head_dim: int, world_size: int, device_type: str = "cpu", itemsize: int = 4,
    node_sizes: Sequence[int] = (),
) -> float:  # fmt: skip
    """Bytes that the busiest rank receives in one `tree_reduce` of `rows = B T H` rows of `head_dim = D_v`.

    device_type: what "auto" is resolved with. itemsize: bytes of an element, 4 but for float64. node_sizes: the ranks
    of each node, for "two_level" and "auto"; `level_bytes` has each level by itself. One node, or none given: flat.
    """
    _check_algorithm(algorithm)
    packed, share = rows * (head_dim + 1) * itemsize, (world_size - 1) / world_size
    if algorithm == "auto" or (algorithm == "two_level" and len(node_sizes) < 2):
        algorithm = choose_algorithm(device_type, world_size, nodes=len(node_sizes))
    match algorithm:
        case "two_level":
            return sum(level_bytes(rows=rows, head_dim=head_dim, node_sizes=node_sizes, itemsize=itemsize))
        case "all_gather":
            return (world_size - 1) * packed
        case "all_reduce":
            return 2 * share * rows * (head_dim + 2) * itemsize
        case "tree":
            return (world_size - 1).bit_length() * packed
        case "reduce_scatter":
            return share * packed
        case "symmetric_scatter":
            return 2 * share * packed  # each 4 bytes travel with an epoch
        case _:
            return 2 * (world_size - 1) * packed


def _check_algorithm(algorithm: str) -> None:
    if algorithm not in (*ALGORITHMS, "auto"):
        raise InputError(f"algorithm must be 'auto' or one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
