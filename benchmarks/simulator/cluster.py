"""The timeline of GPUs and links: when each kernel ends and each message arrives, for all ranks at once as vectors.

A rank has two ports, each with a sending and a receiving side: one to the GPUs of its node (`machine.inside`), one to
other nodes (`machine.across`). A message of n bytes occupies the sender's port for n / bytes_per_s. Its first byte
reaches the receiver latency_s later, and is received at the same rate as soon as the receiver's port is free. Between
idle ports a message therefore takes latency_s + n / bytes_per_s. A rank starts no other exchange before its message has
left.

A port receives messages in program order; those of one `send_to_all`, which have no order, as they arrive. The time of
every event is therefore a maximum of earlier times plus a duration, no event can overtake another, and rounds computed
as vectors give the same times as a queue of events (tests/test_simulate.py has the queue).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tree_attention.cost.machine import Machine

AHEAD = 32

Array = NDArray[np.float64]
RankArray = NDArray[np.int64]


@dataclass(frozen=True)
class Messages:
    """One round of messages `source[i]` -> `target[i]`: at most one from, and one to each rank. See `Cluster.route`."""

    source: RankArray | slice  # a slice if possible: faster
    target: RankArray | slice
    sender: RankArray | None  # the sender to each rank, if every rank sends and receives
    port: RankArray | slice  # the target's: r inside a node, P + r for other nodes
    across: NDArray[np.bool_]
    latency_s: Array
    s_per_byte: Array
    call_s: Array  # [P], cost of the NCCL call on each rank, without the messages; 0 if it makes none
    sent_bytes: Array  # so far, counted by `Cluster.send`


class Cluster:
    """The state of a simulation: when each port is free to receive, and the bytes that each rank has sent.

    machine: each node holds consecutive ranks. kernel_jitter, link_jitter: the time of every kernel and every message
    is multiplied by 1 + jitter Exp(1), drawn for each one. stragglers: rank -> factor by which its kernels take longer.
    """

    def __init__(
        self,
        machine: Machine,
        ranks: int,
        *,
        seed: int = 0,
        kernel_jitter: float = 0.0,
        link_jitter: float = 0.0,
        stragglers: Mapping[int, float] | None = None,
    ) -> None:
        self.machine, self.ranks = machine, ranks
        self._port_free_s = np.zeros(2 * ranks)
        self._routes: list[Messages] = []
        self._sent_to_all_bytes = 0.0
        of_kernels, of_links = np.random.default_rng(seed).spawn(2)
        self._kernel_jitter, self._link_jitter = _Jitter(of_kernels, kernel_jitter), _Jitter(of_links, link_jitter)
        self.node_size = min(ranks, machine.per_node)
        self.nodes = ranks // self.node_size
        self._slowness = np.ones(ranks)
        for rank, factor in (stragglers or {}).items():
            self._slowness[rank] = factor

    def kernel(self, seconds: Array | float, ready_s: Array) -> Array:
        """Return when the kernels that start at `ready_s` `[P]` end.

        seconds: their duration, one number or `[P]`, on a GPU that is not a straggler.
        """
        return self.kernels((seconds,), ready_s)[0]

    def kernels(self, seconds: Sequence[Array | float], ready_s: Array) -> list[Array]:
        """The same for several kernels that start together and share their jitter."""
        stretch = self._slowness * self._kernel_jitter.stretch(ready_s.shape)
        return [ready_s + each_s * stretch for each_s in seconds]

    def route(self, source: RankArray, target: RankArray, *, adapters: int = 1) -> Messages:
        """Prepare a round of messages. adapters: number of a node's adapters that share a message to another node."""
        across = source // self.machine.per_node != target // self.machine.per_node
        inside, between = self.machine.inside, self.machine.across
        latency_s = np.where(across, between.latency_s, inside.latency_s)
        call_s = np.zeros(self.ranks)
        for ranks in (source, target):
            called_s = np.where(across, between.collective_s, inside.collective_s) - latency_s
            call_s[ranks] = np.maximum(call_s[ranks], called_s)
        messages = Messages(
            _index(source),
            _index(target),
            target.argsort() if len(target) == self.ranks and np.array_equal(source, np.arange(self.ranks)) else None,
            _index(target + self.ranks * across),
            across,
            latency_s,
            np.where(across, 1 / (adapters * between.bytes_per_s), 1 / inside.bytes_per_s),
            call_s,
            np.zeros(len(source)),
        )
        self._routes.append(messages)
        return messages

    def send(self, messages: Messages, message_bytes: Array | float, ready_s: Array) -> Array:
        """Return when each rank's message has left and the one to it has arrived; `ready_s` if there is neither.

        message_bytes: one number, or one per message. ready_s: `[P]`, when each rank's data is ready.
        """
        stretch = self._link_jitter.stretch(messages.latency_s.shape)
        port_s = message_bytes * messages.s_per_byte * stretch
        leaves_s = ready_s[messages.source]
        arrives_s = np.maximum(leaves_s + messages.latency_s * stretch, self._port_free_s[messages.port]) + port_s
        self._port_free_s[messages.port] = arrives_s
        np.add(messages.sent_bytes, message_bytes, out=messages.sent_bytes)
        if messages.sender is not None:
            return np.maximum(leaves_s + port_s, arrives_s[messages.sender])
        done_s = ready_s.copy()
        done_s[messages.source] = leaves_s + port_s
        done_s[messages.target] = np.maximum(done_s[messages.target], arrives_s)
        return done_s

    def send_to_all(self, size: int, message_bytes: float, ready_s: Array) -> Array:
        """Return when each rank has sent to, and received from, all others of its `size` consecutive ranks in the node.

        Rank r sends to r + 1, r + 2, ... in turn. The receiver's port takes messages as they arrive.
        """
        P, others = self.ranks, np.arange(1, size)
        stretch = self._link_jitter.stretch((P, size - 1))
        port_s = np.full((P, size - 1), message_bytes / self.machine.inside.bytes_per_s) * stretch
        left_s = ready_s[:, None] + port_s.cumsum(1)
        heads_s = left_s - port_s + self.machine.inside.latency_s * stretch
        rank = np.arange(P)[:, None]
        source = rank // size * size + (rank - others) % size  # the sender whose i-th message goes to `rank`
        heads_s, port_s = heads_s[source, others - 1], port_s[source, others - 1]
        order = heads_s.argsort(1)
        heads_s, port_s = np.take_along_axis(heads_s, order, 1), np.take_along_axis(port_s, order, 1)
        rest_s = port_s[:, ::-1].cumsum(1)[:, ::-1]  # this message and the ones after it
        arrived_s = np.maximum((heads_s + rest_s).max(1), self._port_free_s[:P] + rest_s[:, 0])
        self._port_free_s[:P] = arrived_s
        self._sent_to_all_bytes += (size - 1) * message_bytes
        return np.maximum(left_s[:, -1], arrived_s)

    def sent_bytes(self) -> Array:
        """`[2, P]`: bytes that each rank has sent within its node and to other nodes."""
        sent = np.zeros((2, self.ranks))
        sent[0] += self._sent_to_all_bytes
        for messages in self._routes:
            sent[messages.across.astype(int), np.arange(self.ranks)[messages.source]] += messages.sent_bytes
        return sent


class _Jitter:
    """Random factors 1 + share Exp(1) for the durations of kernels or messages."""

    def __init__(self, random: np.random.Generator, share: float) -> None:
        self._random, self._share, self._drawn = random, share, np.empty(0)

    def stretch(self, shape: tuple[int, ...]) -> Array | float:
        """Return random factors of this shape. They are drawn for AHEAD calls at once, which is faster."""
        if not self._share:
            return 1.0
        count = math.prod(shape)
        if len(self._drawn) < count:
            drawn = self._random.standard_exponential(AHEAD * count)
            drawn *= self._share
            drawn += 1
            self._drawn = np.concatenate([self._drawn, drawn])
        stretch, self._drawn = self._drawn[:count].reshape(shape), self._drawn[count:]
        return stretch


def _index(ranks: RankArray) -> RankArray | slice:
    start, stop = int(ranks[0]), int(ranks[-1]) + 1
    return slice(start, stop) if np.array_equal(ranks, np.arange(start, stop)) else ranks
