"""The time of one attention decode step of one layer, from bytes, links and launches, for each exchange algorithm.

docs/planning.md has the formulas. n is `partial_bytes`; P ranks are on M nodes of g ranks. If an exchange crosses two
kinds of links, the slower one counts. Bytes are those of reduce/__init__.py and of arXiv 2408.04093, eq 10 and 14. The
rest is approximate: collective_s is measured with two ranks and each further hop adds one latency; all ranks start at
the same time; only the ring overlaps communication and compute. Not counted: merging many rows after the last key
(measured: 25 us at 2048 rows), and the lower bandwidth of short NCCL messages.
"""

import math
from dataclasses import dataclass

from .machine import LinkSpec, Machine

ALGORITHMS = ("ring", "all_reduce", "all_gather", "tree", "two_level", "symmetric", "fused")
Exchange = tuple[float, float, float]  # seconds, bytes received within the node, bytes received between nodes
PACK_KERNELS, MERGE_KERNELS = 2, 3  # small kernels around a collective: out and lse into one buffer; weights, sum


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention step: q is `[batch, query_tokens, heads, head_dim]`.

    keys: keys per sequence and rank (the mean over ragged sequences), one number for all ranks or one per rank.
    itemsize: bytes per element of K and V. latent: MLA, where the values are the first head_dim_v elements of the keys
    and are not read again.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: float | tuple[float, ...]
    head_dim_v: int | None = None
    query_tokens: int = 1
    itemsize: float = 2
    latent: bool = False

    @property
    def rows(self) -> int:
        """Number of query rows, B T H."""
        return self.batch * self.query_tokens * self.heads

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def most_keys(self) -> float:
        """Keys per sequence on the rank with the most keys, for which the others wait."""
        return max(self.keys) if isinstance(self.keys, tuple) else self.keys

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values on the rank with the most keys."""
        numbers = self.head_dim if self.latent else self.head_dim + self.value_dim
        return self.batch * self.most_keys * self.kv_heads * numbers * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """Bytes of a partial result: out and lse in float32."""
        return self.rows * (self.value_dim + 1) * 4

    @property
    def flops(self) -> float:
        """FLOPs of q @ k and p @ v on the rank with the most keys."""
        return 2 * self.rows * self.most_keys * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Cost:
    """Seconds per part of a step, and the bytes a rank receives from its own node and from other nodes.

    exchange_s: what attention does not hide, with the exchange's kernels. launch_s: launches of the attention kernels.
    """

    read_s: float
    exchange_s: float
    launch_s: float
    inside_bytes: float
    across_bytes: float

    @property
    def total_s(self) -> float:
        return self.read_s + self.exchange_s + self.launch_s

    @property
    def bound(self) -> str:
        """Name of the largest part: "read", "exchange" or "launch"."""
        parts = {"read": self.read_s, "exchange": self.exchange_s, "launch": self.launch_s}
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class RankGroup:
    """`size` ranks, of which each node holds `per_node` consecutive ones: `inside` ranks per node on `nodes` nodes."""

    size: int
    per_node: int

    @property
    def inside(self) -> int:
        return min(self.size, self.per_node)

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.per_node)

    def slowest(self, machine: Machine) -> LinkSpec:
        """The slowest link that a flat exchange over all ranks uses."""
        return machine.inside if self.nodes == 1 else machine.across


def decode_cost(
    shape: AttentionShape, machine: Machine, ranks: int, algorithm: str = "fused", *, per_node: int | None = None
) -> Cost:
    """Return the cost of a decode step on the slowest of `ranks` ranks. One rank exchanges nothing.

    per_node: ranks of this group per node. Default: the machine's. Fewer if ranks of other groups lie between them.

    Raises:
        ValueError: the algorithm is unknown, a size is below 1, `shape.keys` has another number of ranks, or the
            algorithm writes into peer memory (symmetric, fused, two_level within a node) and the machine cannot.
    """
    group = RankGroup(ranks, machine.per_node if per_node is None else per_node)
    _check(shape, machine, group, algorithm)
    gpu = machine.gpu
    read_s = max(shape.kv_bytes / gpu.read_bytes_per_s, shape.flops / gpu.matmul_flops_per_s)
    if ranks == 1:
        return Cost(read_s, 0.0, gpu.launch_s, 0.0, 0.0)
    if algorithm == "ring":
        return _ring(shape, machine, group, read_s)
    exchange_s, inside_bytes, across_bytes = exchange_cost(shape, machine, group, algorithm)
    return Cost(read_s, exchange_s, gpu.launch_s, inside_bytes, across_bytes)


def exchange_cost(shape: AttentionShape, machine: Machine, group: RankGroup, algorithm: str) -> Exchange:
    """The exchange after the local attention; not for the ring."""
    inside, across, kernel_s = machine.inside, machine.across, machine.gpu.kernel_s
    P, g, M, n = group.size, group.inside, group.nodes, shape.partial_bytes
    around_s = (PACK_KERNELS + MERGE_KERNELS) * kernel_s
    match algorithm:
        case "all_reduce":
            calls = [all_reduce_cost(4 * shape.rows, machine, group) for _ in range(2)]
            calls.append(all_reduce_cost(n - 4 * shape.rows, machine, group))
            seconds, in_bytes, out_bytes = (sum(column) for column in zip(*calls, strict=True))
            return seconds + around_s, in_bytes, out_bytes
        case "all_gather":
            call_s = group.slowest(machine).collective_s + _hops_s(P - M, M - 1, 1, machine)
            entering = (P - g) * n / g  # the partials of other nodes enter a node once, over all its adapters
            move_s = max((P - 1) * n / inside.bytes_per_s, entering / across.bytes_per_s)
            return call_s + move_s + around_s, (P - 1) * n, entering
        case "tree":
            near, far = math.ceil(math.log2(g)), math.ceil(math.log2(M))
            rounds_s = near * (inside.collective_s + n / inside.bytes_per_s)
            rounds_s += far * (across.collective_s + n / across.bytes_per_s)
            merges_s = (near + far) * MERGE_KERNELS * kernel_s
            return rounds_s + merges_s + PACK_KERNELS * kernel_s, near * n, far * n
        case "two_level":
            level = 2 * (g - 1) / g * n
            inside_s = 2 * (inside.latency_s + kernel_s + level / inside.bytes_per_s) if g > 1 else 0.0
            far = (M - 1) * n / g
            if M == 1:
                return inside_s, 2 * level, 0.0
            across_s = across.collective_s + (M - 2) * across.latency_s + far / across.bytes_per_s
            return inside_s + across_s + around_s, 2 * level, far
        case _:
            pushed = 2 * (P - 1) * n
            own_kernel_s = kernel_s if algorithm == "symmetric" else 0.0
            return inside.latency_s + pushed / inside.bytes_per_s + own_kernel_s, pushed, 0.0


def all_reduce_cost(count_bytes: float, machine: Machine, group: RankGroup) -> Exchange:
    """NCCL's all-reduce: up a tree and down, 2 (P - 1) / P of the bytes."""
    if group.size == 1:
        return 0.0, 0.0, 0.0
    near, far = math.ceil(math.log2(group.inside)), math.ceil(math.log2(group.nodes))
    call_s = group.slowest(machine).collective_s + _hops_s(2 * near, 2 * far, 2, machine)
    moved = 2 * (group.size - 1) / group.size * count_bytes
    far_moved = 2 * (group.nodes - 1) / group.nodes * count_bytes / group.inside
    move_s = max(moved / machine.inside.bytes_per_s, far_moved / machine.across.bytes_per_s)
    return call_s + move_s, moved, far_moved


def _hops_s(near: int, far: int, included: int, machine: Machine) -> float:
    """Latency of consecutive hops, less the `included` hops that are part of the measured `collective_s`."""
    near, far = (near, far - included) if far else (near - included, 0)
    return near * machine.inside.latency_s + far * machine.across.latency_s


def _ring(shape: AttentionShape, machine: Machine, group: RankGroup, read_s: float) -> Cost:
    """Each shard is sent on while the attention over it is computed. The results are merged once."""
    link, gpu, hops = group.slowest(machine), machine.gpu, group.size - 1
    hop_s = link.collective_s + shape.kv_bytes / link.bytes_per_s
    waits_s = hops * max(0.0, hop_s - read_s - gpu.launch_s)
    launches_s = group.size * (gpu.launch_s + PACK_KERNELS * gpu.kernel_s) + MERGE_KERNELS * gpu.kernel_s
    received = hops * shape.kv_bytes
    across_bytes = 0.0 if group.nodes == 1 else received  # for the first rank of a node
    inside_bytes = received if group.inside > 1 else 0.0
    return Cost(group.size * read_s, waits_s, launches_s, inside_bytes, across_bytes)


def _check(shape: AttentionShape, machine: Machine, group: RankGroup, algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    sizes = (shape.rows, shape.kv_heads, shape.head_dim, shape.value_dim, group.size, group.per_node)
    if min(shape.batch, *sizes) < 1 or shape.most_keys < 0 or shape.itemsize <= 0:
        raise ValueError(f"sizes must be at least 1 and keys at least 0, got {shape} on {group}")
    if isinstance(shape.keys, tuple) and len(shape.keys) != group.size:
        raise ValueError(f"keys must be one number or one per rank ({group.size}), got {len(shape.keys)}")
    if algorithm in ("symmetric", "fused", "two_level") and group.inside > 1 and not machine.inside.peer_access:
        raise ValueError(f"{algorithm} needs peer access, which {machine.inside.name} lacks: use all_gather or tree")
    if algorithm in ("symmetric", "fused") and group.nodes > 1:
        here = f"{group.size} ranks on {group.nodes} nodes"
        raise ValueError(f"{algorithm} needs all ranks on one node, got {here}: use two_level, all_gather or tree")
