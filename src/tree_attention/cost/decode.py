"""One attention decode step of one layer: bytes, links and launches to seconds, for each way of exchanging.

P ranks, g of them a node, M nodes. n = rows (D_v + 1) 4 bytes, with rows = B T H, is a rank's partial in float32; lat,
call and bw are latency_s, collective_s and bytes_per_s of a link; of two links on the way the slower one counts.

                  exchange, beyond reading the own keys and launching the kernel that does
ring              P - 1 times what a hop, call + KV / bw, takes longer than the attention it hides under; and P - 1 more
                  shards to read
all_reduce        3 (call + 2 (hops of a tree - 1) lat) + 2 (P - 1)/P (n + 4 rows) / bw               Algorithm 3
all_gather        call + (P - 2) lat + (P - 1) n / bw                                     one ring over all ranks
tree              ceil(log2 P) (call + n / bw)
two_level         inside, (lat + 2 (g-1)/g n / bw) twice; across, call + (M - 2) lat + (M - 1) n/g / bw
symmetric         lat + 2 (P - 1) n / bw + a small kernel: packets hold half data, half epoch
fused             lat + 2 (P - 1) n / bw

Around a collective of these, the ring's included, there are small kernels, which pack, and merge after each round.

Sources: bytes, reduce/__init__.py and arXiv 2408.04093 eq 10 and 14. The rest is approximate: call is measured with two
ranks, and each further hop adds one latency; ranks start at once; nothing but the ring overlaps; merging many rows
after the last key is not counted (measured: 25 us at 2048 rows), nor what short NCCL messages lose of a link's rate.
"""

import math
from dataclasses import dataclass

from .machine import Link, Machine

ALGORITHMS = ("ring", "all_reduce", "all_gather", "tree", "two_level", "symmetric", "fused")
PACK_KERNELS, MERGE_KERNELS = 2, 3  # small kernels around a collective: out and lse into one buffer; weights, sum


@dataclass(frozen=True)
class Shape:
    """q `[batch, query_tokens, heads, head_dim]` over each rank's keys.

    keys: of one sequence on a rank, the mean if they are ragged; one number, or each rank's own. itemsize: bytes of an
    element of K and V.
    latent: the values are the first head_dim_v numbers of the keys and are read once (MLA).
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
        """B T H"""
        return self.batch * self.query_tokens * self.heads

    @property
    def value_dim(self) -> int:
        """D_v"""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def most_keys(self) -> float:
        """Of one sequence, on the rank that has most: the others wait for it."""
        return max(self.keys) if isinstance(self.keys, tuple) else self.keys

    @property
    def kv_bytes(self) -> float:
        """Of the keys and values on that rank."""
        numbers = self.head_dim if self.latent else self.head_dim + self.value_dim
        return self.batch * self.most_keys * self.kv_heads * numbers * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """Of out and lse in float32."""
        return self.rows * (self.value_dim + 1) * 4

    @property
    def flops(self) -> float:
        """Of both products, on that rank."""
        return 2 * self.rows * self.most_keys * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Cost:
    """Seconds by what they are spent on, and the bytes that a rank is sent inside its node and from other nodes.

    exchange_s: as far as it is not hidden. launch_s: the kernels that read and merge, without those of an exchange.
    """

    read_s: float
    exchange_s: float
    launch_s: float
    inside_bytes: float
    across_bytes: float

    @property
    def total_s(self) -> float:
        """Of the step."""
        return self.read_s + self.exchange_s + self.launch_s

    @property
    def bound(self) -> str:
        """The largest part: "read", "exchange" or "launch"."""
        parts = {"read": self.read_s, "exchange": self.exchange_s, "launch": self.launch_s}
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class Ranks:
    """`size` ranks of a group, `per_node` of them a node, neighbours first."""

    size: int
    per_node: int

    @property
    def inside(self) -> int:
        """g"""
        return min(self.size, self.per_node)

    @property
    def nodes(self) -> int:
        """M"""
        return math.ceil(self.size / self.per_node)

    def slowest(self, machine: Machine) -> Link:
        """The link that a flat exchange over all of them waits for."""
        return machine.inside if self.nodes == 1 else machine.across


def decode_cost(
    shape: Shape, machine: Machine, ranks: int, algorithm: str = "fused", *, per_node: int | None = None
) -> Cost:
    """What a decode step costs on the slowest of `ranks` ranks.

    per_node: ranks of this group in a node, the machine's by default; fewer where other ranks sit between them. One
    rank exchanges nothing, whatever the algorithm.

    Raises:
        ValueError: an unknown algorithm, sizes below 1, lengths for another number of ranks, or an exchange through
            the peers' memory (symmetric, fused, in a node two_level) where that cannot be written.
    """
    group = Ranks(ranks, machine.per_node if per_node is None else per_node)
    _check(shape, machine, group, algorithm)
    read_s = max(shape.kv_bytes / machine.gpu.read_bytes_per_s, shape.flops / machine.gpu.matmul_flops_per_s)
    own = Cost(read_s, 0.0, machine.gpu.launch_s, 0.0, 0.0)
    if ranks == 1:
        return own
    if algorithm == "ring":
        return _ring(shape, machine, group, own)
    exchange_s, inside_bytes, across_bytes = exchange(shape, machine, group, algorithm)
    return Cost(read_s, exchange_s, own.launch_s, inside_bytes, across_bytes)


def exchange(shape: Shape, machine: Machine, group: Ranks, algorithm: str) -> tuple[float, float, float]:
    """Seconds, bytes inside and bytes across of what follows a rank's own attention; every algorithm but the ring."""
    inside, across, kernel_s = machine.inside, machine.across, machine.gpu.kernel_s
    P, g, M, n = group.size, group.inside, group.nodes, shape.partial_bytes
    around_s = (PACK_KERNELS + MERGE_KERNELS) * kernel_s
    match algorithm:
        case "all_reduce":
            calls = [all_reduce(4 * shape.rows, machine, group) for _ in range(2)]
            calls.append(all_reduce(n - 4 * shape.rows, machine, group))
            seconds, in_bytes, out_bytes = (sum(column) for column in zip(*calls, strict=True))
            return seconds + around_s, in_bytes, out_bytes
        case "all_gather":
            call_s = group.slowest(machine).collective_s + _hops_s(P - M, M - 1, 1, machine)
            entering = (P - g) * n / g  # what the other nodes hold comes once, over all adapters of the node
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


def all_reduce(count_bytes: float, machine: Machine, group: Ranks) -> tuple[float, float, float]:
    """Seconds, bytes inside and bytes across of NCCL's all-reduce: up a tree and down, 2 (P - 1) / P of the bytes."""
    if group.size == 1:
        return 0.0, 0.0, 0.0
    near, far = math.ceil(math.log2(group.inside)), math.ceil(math.log2(group.nodes))
    call_s = group.slowest(machine).collective_s + _hops_s(2 * near, 2 * far, 2, machine)
    moved = 2 * (group.size - 1) / group.size * count_bytes
    far_moved = 2 * (group.nodes - 1) / group.nodes * count_bytes / group.inside
    move_s = max(moved / machine.inside.bytes_per_s, far_moved / machine.across.bytes_per_s)
    return call_s + move_s, moved, far_moved


def _hops_s(near: int, far: int, included: int, machine: Machine) -> float:
    """Of messages one after the other, without those that `collective_s`, measured with two ranks, includes."""
    near, far = (near, far - included) if far else (near - included, 0)
    return near * machine.inside.latency_s + far * machine.across.latency_s


def _ring(shape: Shape, machine: Machine, group: Ranks, own: Cost) -> Cost:
    """Each hop is sent while the attention over the shard at hand is computed; the results are merged once."""
    link, kernel_s = group.slowest(machine), machine.gpu.kernel_s
    hops = group.size - 1
    hop_s = link.collective_s + shape.kv_bytes / link.bytes_per_s
    waits_s = hops * max(0.0, hop_s - own.read_s - own.launch_s)
    launches_s = group.size * (own.launch_s + PACK_KERNELS * kernel_s) + MERGE_KERNELS * kernel_s
    received = hops * shape.kv_bytes
    across_bytes = 0.0 if group.nodes == 1 else received  # of the rank behind a border
    inside_bytes = received if group.inside > 1 else 0.0
    return Cost(group.size * own.read_s, waits_s, launches_s, inside_bytes, across_bytes)


def _check(shape: Shape, machine: Machine, group: Ranks, algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    sizes = (shape.rows, shape.kv_heads, shape.head_dim, shape.value_dim, group.size, group.per_node)
    if min(shape.batch, *sizes) < 1 or shape.most_keys < 0 or shape.itemsize <= 0:
        raise ValueError(f"sizes must be at least 1 and keys at least 0, got {shape} on {group}")
    if isinstance(shape.keys, tuple) and len(shape.keys) != group.size:
        raise ValueError(f"keys must be one number or one for each of {group.size} ranks, got {len(shape.keys)}")
    if algorithm in ("symmetric", "fused", "two_level") and group.inside > 1 and not machine.inside.peer_access:
        raise ValueError(f"{algorithm} needs peer access, which {machine.inside.name} has not: use all_gather or tree")
    if algorithm in ("symmetric", "fused") and group.nodes > 1:
        raise ValueError(
            f"{algorithm} writes into the peers' memory, which needs one node, and {group.size} ranks are on "
            f"{group.nodes}: use two_level, all_gather or tree"
        )
