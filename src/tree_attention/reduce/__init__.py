"""A Partial on every rank -> one. The only place of the core that communicates.

                 collectives                     bytes a rank receives, n = rows (D_v + 1) 4       result
all_gather       1 all-gather, packed            (P - 1) n                                         all heads
all_reduce       3 all-reduces (Algorithm 3)     2 (P - 1) / P rows (D_v + 2) 4                    all heads
tree             ceil(log2 P) exchanges          ceil(log2 P) n                                    all heads
reduce_scatter   1 all-to-all, packed            (P - 1) / P n                                     H / P heads

P ranks; rows = B T H; float32. docs/math.md has these beside the paper's formulas. With P not a power of two, the last
of tree's exchanges waits for two others (tree.py).
"""

from torch.distributed import ProcessGroup

from ..errors import InputError
from ..group import Group, rank_and_size, resolve_group
from ..partial import Partial
from .collectives import all_gather, all_reduce, reduce_scatter
from .tree import tree

__all__ = ["ALGORITHMS", "check_reduction", "choose_algorithm", "received_bytes", "tree_reduce"]

ALGORITHMS = ("all_gather", "all_reduce", "tree", "reduce_scatter")


def tree_reduce(partial: Partial, group: Group = None, *, algorithm: str = "auto") -> Partial:
    """Merge the partials of all ranks of `group`.

    Args:
        partial: this rank's, out `[B, T, H, D_v]` and lse `[B, T, H]`; the same shape, dtype and kind of device on
            every rank. `(0, -inf)` is a legal partial, on some ranks or on all.
        group: a process group, a 1-D DeviceMesh, or None for all ranks (without an initialised process group:
            this process alone). Any number of ranks.
        algorithm: one of `ALGORITHMS`, or "auto": what `choose_algorithm` says.

    Returns:
        The merged Partial, the same bits on every rank ("all_reduce": as far as the backend's all-reduce gives them;
        gloo's and NCCL's do). With "reduce_scatter" rank r keeps heads
        `r H / P .. (r + 1) H / P - 1` only.

    Raises:
        InputError: an unknown algorithm, a group this rank is not in, "reduce_scatter" with H not a multiple of P.
    """
    process_group = check_reduction(partial.out.shape[2], group, algorithm)
    if process_group is None or process_group.size() == 1:
        return partial
    if algorithm == "auto":
        algorithm = choose_algorithm(partial.out.device.type, process_group.size())
    match algorithm:
        case "all_gather":
            return all_gather(partial, process_group)
        case "all_reduce":
            return all_reduce(partial, process_group)
        case "tree":
            return tree(partial, process_group)
        case _:
            return reduce_scatter(partial, process_group, dim=2)


def check_reduction(heads: int, group: Group, algorithm: str) -> ProcessGroup | None:
    """The process group behind `group`, or what `tree_reduce` raises; no communication."""
    _check_algorithm(algorithm)
    process_group = resolve_group(group)
    size = rank_and_size(process_group)[1]
    if algorithm == "reduce_scatter" and heads % size:
        raise InputError(f"reduce_scatter needs heads that divide by the ranks, got {heads} heads and {size} ranks")
    return process_group


def choose_algorithm(device_type: str, world_size: int) -> str:
    """What "auto" stands for; only from values that all ranks share.

    On CUDA "all_gather": one collective, and one NCCL launch. On the CPU "tree": gloo's point-to-point calls wake two
    threads where its collectives wake five, so one exchange of 2.3 KB takes a third of the time (docs/log.md).
    """
    return "all_gather" if device_type == "cuda" or world_size == 1 else "tree"


def received_bytes(
    algorithm: str, *, rows: int, head_dim: int, world_size: int, device_type: str = "cpu", itemsize: int = 4
) -> float:
    """Bytes that the busiest rank receives in one `tree_reduce` of `rows = B T H` rows of `head_dim = D_v`.

    device_type: what "auto" is resolved with. itemsize: bytes of an element, 4 but for float64.
    """
    _check_algorithm(algorithm)
    packed, share = rows * (head_dim + 1) * itemsize, (world_size - 1) / world_size
    match algorithm if algorithm != "auto" else choose_algorithm(device_type, world_size):
        case "all_gather":
            return (world_size - 1) * packed
        case "all_reduce":
            return 2 * share * rows * (head_dim + 2) * itemsize
        case "tree":
            return (world_size - 1).bit_length() * packed
        case _:
            return share * packed


def _check_algorithm(algorithm: str) -> None:
    if algorithm not in (*ALGORITHMS, "auto"):
        raise InputError(f"algorithm must be 'auto' or one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
