"""The exchange algorithms as rounds of messages: who sends how many bytes to whom.

                 rounds, P = g M ranks on M nodes                  bytes sent per rank, n = rows (D_v + 1) 4
all_reduce       3 calls of log2 g + 2 ceil(log2 M) + log2 g       2 (P - 1) / P rows (D_v + 2) 4, mean over ranks
all_gather       1 call of P - 1                                   (P - 1) n
tree             ceil(log2 P) calls of 1                           ceil(log2 P) n at most
two_level        2 pushes, between them 1 call of M - 1            (4 (g - 1) + M - 1) n / g
symmetric        1 push to all                                     2 (P - 1) n
fused            1 push to all, from the attention's kernel        2 (P - 1) n

A call is an NCCL call. It costs the link's collective_s, measured with two ranks, less the latencies included in that,
followed by the messages. A push is a kernel that writes packets, half data and half epoch, into peer memory.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from tree_attention.cost.decode import MERGE_KERNELS, PACK_KERNELS

from .cluster import Array, Cluster, RankArray

Stage = Callable[[Array], Array]  # `[P]`, when each rank is ready -> `[P]`, when it is done


def stages(algorithm: str, cluster: Cluster, rows: int, value_dim: int) -> list[Stage]:
    """The stages between the end of each rank's local attention and the merged result on all ranks."""
    n = 4 * rows * (value_dim + 1)
    if cluster.ranks == 1:
        return []
    match algorithm:
        case "all_reduce":
            return _algorithm_3(cluster, rows, value_dim)
        case "all_gather":
            whole = np.arange(cluster.ranks)[:, None]
            return [_kernels(cluster, PACK_KERNELS), *_gather(cluster, whole, n), _kernels(cluster, MERGE_KERNELS)]
        case "tree":
            return _tree(cluster, n)
        case "two_level":
            return _two_level(cluster, n)
        case "symmetric":
            return [_kernels(cluster, 1), partial(cluster.send_to_all, cluster.ranks, 2 * n)]
        case _:
            return [partial(cluster.send_to_all, cluster.ranks, 2 * n)]


def ring(cluster: Cluster) -> Callable[[Array, Array, Array], Array]:
    """Return a step of ring attention, as in bench/peers.py: (shard bytes, read seconds, ready) -> done, each `[P]`.

    A shard, without repeated KV heads, is sent on while the attention over it is computed. There are two buffers, so a
    shard leaves when its receiver has finished the one before the last. A hop ends when attention, sending and
    receiving have ended. The results are merged at the end.
    """
    P, gpu = cluster.ranks, cluster.machine.gpu
    following = np.roll(np.arange(P), -1)
    around = cluster.route(np.arange(P), following)

    def step(shard_bytes: Array, read_s: Array, ready_s: Array) -> Array:
        attend_s = gpu.launch_s + PACK_KERNELS * gpu.kernel_s + np.concatenate([read_s, read_s])
        shard_bytes = np.concatenate([shard_bytes, shard_bytes])
        for hop in range(P):
            here = slice(P - hop, 2 * P - hop)  # the owner of the shard that each rank holds
            attended_s, called_s = cluster.kernels((attend_s[here], around.call_s), ready_s)  # they start together
            if hop < P - 1:
                ready_s = cluster.send(around, shard_bytes[here], np.maximum(called_s, called_s[following]))
            ready_s = np.maximum(ready_s, attended_s)
        return cluster.kernel(MERGE_KERNELS * gpu.kernel_s, ready_s)

    return step


def _algorithm_3(cluster: Cluster, rows: int, value_dim: int) -> list[Stage]:
    """Algorithm 3 of arXiv 2408.04093: all-reduce the maximum, the numerator and the denominator, in float32."""
    largest, numerator, denominator = (_all_reduce(cluster, 4 * count) for count in (rows, rows * value_dim, rows))
    copy, divide = _kernels(cluster, 1), _kernels(cluster, 1)
    weigh = _kernels(cluster, PACK_KERNELS + MERGE_KERNELS - 2)  # subtract, exp, multiply
    return [copy, *largest, weigh, *numerator, *denominator, divide]


def _all_reduce(cluster: Cluster, total_bytes: float) -> list[Stage]:
    """Reduce-scatter in each node, each piece up and down a binomial tree of the nodes, all-gather in each node.

    Within a node by recursive halving: log2 g rounds and the bytes of a ring. If g is not a power of two: a ring.
    """
    size, ranks = cluster.node_size, np.arange(cluster.ranks)
    if size & (size - 1):
        following = ranks // size * size + (ranks + 1) % size
        scatter = gather = [_send(cluster, ranks, following, total_bytes / size)] * (size - 1)
    else:
        gather = [_send(cluster, ranks, ranks ^ distance, total_bytes * distance / size) for distance in _powers(size)]
        scatter = gather[::-1]
    by_node, nodes = ranks.reshape(-1, size), np.arange(cluster.nodes)
    up = [(senders, senders - d) for d in _powers(cluster.nodes) for senders in [nodes[nodes % (2 * d) == d]]]
    tree = up + [(target, source) for source, target in reversed(up)]
    over_nodes = [_send(cluster, by_node[source], by_node[target], total_bytes / size) for source, target in tree]
    return [_call(cluster, 2), *scatter, *over_nodes, *gather]


def _gather(cluster: Cluster, members: RankArray, message_bytes: float) -> list[Stage]:
    """One all-gather in each column of `members` `[M, lanes]`, as a ring.

    Messages between nodes are spread over all adapters of a node: NCCL builds a ring through each of them.
    """
    around = cluster.route(
        members.ravel(), np.roll(members, -1, 0).ravel(), adapters=cluster.node_size // members.shape[1]
    )
    return [_call(cluster, 1)] + [partial(cluster.send, around, message_bytes)] * (len(members) - 1)


def _tree(cluster: Cluster, n: float) -> list[Stage]:
    """Recursive doubling (reduce/collectives.py). Ranks past the largest power of two send before and receive after."""
    power = 1 << (cluster.ranks.bit_length() - 1)
    core, extra = np.arange(power), np.arange(power, cluster.ranks)
    rounds = [(core, core ^ distance) for distance in _powers(power)]
    if len(extra):
        rounds = [(extra, extra - power), *rounds, (extra - power, extra)]
    merge_s = MERGE_KERNELS * cluster.machine.gpu.kernel_s
    found: list[Stage] = [_kernels(cluster, PACK_KERNELS)]
    for source, target in rounds:
        messages = cluster.route(source, target)
        merging = np.isin(np.arange(cluster.ranks), target[target < power]).astype(np.float64)
        found.append(partial(cluster.kernel, messages.call_s))
        found.append(partial(cluster.send, messages, n))
        found.append(partial(cluster.kernel, merge_s * merging))
    return found


def _two_level(cluster: Cluster, n: float) -> list[Stage]:
    """Each GPU of a node merges a slice of the rows, slices are gathered across nodes, then within each node."""
    size = cluster.node_size
    push = [_kernels(cluster, 1), partial(cluster.send_to_all, size, 2 * n / size)] if size > 1 else []
    if cluster.nodes == 1:
        return push + push
    across = _gather(cluster, np.arange(cluster.ranks).reshape(-1, size), n / size)
    return [*push, _kernels(cluster, PACK_KERNELS), *across, _kernels(cluster, MERGE_KERNELS), *push]


def _send(cluster: Cluster, source: RankArray, target: RankArray, message_bytes: float) -> Stage:
    return partial(cluster.send, cluster.route(source.ravel(), target.ravel()), message_bytes)


def _call(cluster: Cluster, included: int) -> Stage:
    """One NCCL call of all ranks, without the latencies that are included in the measured collective_s."""
    link = cluster.machine.across if cluster.nodes > 1 else cluster.machine.inside
    return partial(cluster.kernel, link.collective_s - included * link.latency_s)


def _kernels(cluster: Cluster, count: int) -> Stage:
    return partial(cluster.kernel, count * cluster.machine.gpu.kernel_s)


def _powers(stop: int) -> list[int]:
    """1, 2, 4, ... below `stop`."""
    return [1 << i for i in range((stop - 1).bit_length())]
