"""The table of reductions: what each needs, what it receives, and how it runs.

                 collectives                     bytes that a rank receives, n = rows (D_v + 1) 4   result
all_gather       1 all-gather, packed            (P - 1) n                                         all heads
all_reduce       3 all-reduces (Algorithm 3)     2 (P - 1) / P rows (D_v + 2) 4                    all heads
tree             ceil(log2 P) exchanges          ceil(log2 P) n                                    all heads
reduce_scatter   1 all-to-all, packed            (P - 1) / P n                                     H / P heads
shared_memory    none: a push, and a read        2 (P - 1) n                                       all heads
symmetric        none: one kernel, over NVLink   2 (P - 1) n                                       all heads
symmetric_scatter  the same                      2 (P - 1) / P n                                   H / P heads
two_level        3 exchanges, 1 of them across   inside (L + S - 2) / S n, across (N - 1) / S n    all heads

P ranks; rows = B T H; float32; two_level: N nodes, L ranks in the largest, S in the smallest. docs/math.md lists these
beside the paper's formulas. If P is not a power of two, the last exchange of tree waits for two others (tree.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed import ProcessGroup

from ..errors import InputError
from ..partial import Partial
from .collectives import all_gather, all_reduce, reduce_scatter
from .link import Link
from .shared_memory import SharedMemoryLink
from .symmetric import SymmetricLink
from .tree import recursive_doubling
from .two_level import TwoLevel, level_bytes


class Volume(NamedTuple):
    """What is exchanged, and between how many ranks."""

    rows: int
    head_dim: int
    world_size: int
    itemsize: int
    node_sizes: tuple[int, ...]

    @property
    def packed(self) -> int:
        """Bytes of one packed partial."""
        return self.rows * (self.head_dim + 1) * self.itemsize

    @property
    def share(self) -> float:
        """Fraction of a partial that belongs to other ranks."""
        return (self.world_size - 1) / self.world_size


@dataclass(frozen=True)
class Algorithm:
    """One way to merge partials over ranks.

    Attributes:
        received: bytes that the busiest rank receives.
        run: the reduction over a process group; None for algorithms that run over a link.
        link: the class of the link that the algorithm needs, if any.
        scatters: True if each rank gets its own heads only.
    """

    received: Callable[[Volume], float]
    run: Callable[[Partial, ProcessGroup], Partial] | None = None
    link: type[Link] | None = None
    scatters: bool = False


def _reduce_scatter_heads(partial: Partial, group: ProcessGroup) -> Partial:
    return reduce_scatter(partial, group, dim=2)


def _received_all_reduce(volume: Volume) -> float:
    return 2 * volume.share * volume.rows * (volume.head_dim + 2) * volume.itemsize


def _received_two_level(volume: Volume) -> float:
    how = {"rows": volume.rows, "head_dim": volume.head_dim, "itemsize": volume.itemsize}
    return sum(level_bytes(**how, node_sizes=volume.node_sizes))


def _received_packets(volume: Volume) -> float:
    return 2 * (volume.world_size - 1) * volume.packed  # each 4 bytes travel with an epoch of 4 bytes


ALGORITHMS = {
    "all_gather": Algorithm(lambda volume: (volume.world_size - 1) * volume.packed, all_gather),
    "all_reduce": Algorithm(_received_all_reduce, all_reduce),
    "tree": Algorithm(lambda volume: (volume.world_size - 1).bit_length() * volume.packed, recursive_doubling),
    "reduce_scatter": Algorithm(lambda volume: volume.share * volume.packed, _reduce_scatter_heads, scatters=True),
    "shared_memory": Algorithm(_received_packets, link=SharedMemoryLink),
    "symmetric": Algorithm(_received_packets, link=SymmetricLink),
    "symmetric_scatter": Algorithm(lambda volume: 2 * volume.share * volume.packed, link=SymmetricLink, scatters=True),
    "two_level": Algorithm(_received_two_level, link=TwoLevel),
}


def check_name(algorithm: str, names: Sequence[str] = tuple(ALGORITHMS)) -> None:
    """Raise InputError unless `algorithm` is "auto" or one of `names`."""
    if algorithm not in (*names, "auto"):
        raise InputError(f"algorithm must be 'auto' or one of {', '.join(names)}, got {algorithm!r}")


def choose_algorithm(device_type: str, world_size: int, *, linked: bool = False, nodes: int = 1) -> str:
    """Return the algorithm that "auto" stands for, from values that all ranks share.

    Args:
        device_type: of the partial.
        world_size: number of ranks.
        linked: True if there is a link that takes the partial; then its algorithm.
        nodes: number of nodes of a TwoLevel that is passed as the group. "two_level" if there are several, otherwise
            the algorithm of its single node.

    Without a link it is "all_gather" on CUDA, one collective and one NCCL launch, and "tree" on the CPU, where gloo's
    point-to-point calls wake fewer threads than its collectives do (measurements in docs/log.md).
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

    Args:
        algorithm: one of `ALGORITHMS` or "auto".
        rows, head_dim, world_size: the size of a partial, and the number of ranks.
        device_type: what "auto" is resolved with.
        itemsize: bytes per element; 8 for float64.
        node_sizes: the number of ranks of each node, for "two_level" and "auto". With fewer than two nodes both are
            resolved as for a plain group. `level_bytes` has each level separately.
    """
    check_name(algorithm)
    if algorithm == "auto" or (algorithm == "two_level" and len(node_sizes) < 2):
        algorithm = choose_algorithm(device_type, world_size, nodes=len(node_sizes))
    return ALGORITHMS[algorithm].received(Volume(rows, head_dim, world_size, itemsize, tuple(node_sizes)))
