"""GPUs and links in time: when a kernel ends, when a message arrives. All ranks at once, as vectors.

A rank has two ports, each with a sending and a receiving side: one to the GPUs of its node (`machine.inside`), one to
other nodes (`machine.across`). A message of n bytes holds the sender's port for n / bytes_per_s; its first byte is at
the receiver latency_s later, and it is taken in at the same rate once the receiver's port is free. So between idle
ports it takes latency_s + n / bytes_per_s. A rank starts no other exchange before its message has left.

A port takes messages in the order of the program; those of one `send_to_all`, which nobody orders, as they come. So the
time of every event is a maximum of times of earlier ones plus a duration, no event can overtake another, and rounds
computed as vectors give the times that a queue of events gives (tests/test_simulate.py has the queue).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .machine import Machine

Array = NDArray[np.float64]
Ranks = NDArray[np.int64]


@dataclass(frozen=True)
class Messages:
    """At most one from each rank and at most one to each: `source[i]` sends to `target[i]`. Made by `Cluster.route`."""

    source: Ranks | slice  # a slice where it can be one, which is faster
    target: Ranks | slice
    port: Ranks | slice  # the target's: r inside a node, P + r for other nodes
    across: NDArray[np.bool_]
    latency_s: Array
    s_per_byte: Array
    call_s: Array  # [P], what one NCCL call for them costs each rank beside the messages; 0 where there is none
    sent_bytes: Array  # so far, counted by `Cluster.send`


class Cluster:
    """The state of a run: when each port is free to receive, and what each has sent.

    machine: the nodes' GPUs are neighbouring ranks. kernel_jitter, link_jitter: every kernel and every message takes
    (1 + jitter Exp(1)) of its time, Exp(1) a random number of mean 1 drawn for it alone. stragglers: rank -> how many
    times as long its kernels take.
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
        self._kernel_jitter, self._link_jitter = kernel_jitter, link_jitter
        self._kernel_random, self._link_random = np.random.default_rng(seed).spawn(2)
        self.node_size = min(ranks, machine.per_node)
        self.nodes = ranks // self.node_size
        self._slowness = np.ones(ranks)
        for rank, factor in (stragglers or {}).items():
            self._slowness[rank] = factor

    def kernel(self, seconds: Array | float, ready_s: Array) -> Array:
        """When kernels end that start at `ready_s` `[P]` and take so many seconds on a GPU that is no straggler.

        seconds: one number, `[P]`, or `[kernels, P]` for some that start together and share their jitter.
        """
        return ready_s + seconds * self._slowness * _stretch(self._kernel_random, self._kernel_jitter, ready_s.shape)

    def route(self, source: Ranks, target: Ranks, *, adapters: int = 1) -> Messages:
        """adapters: over how many of a node's a message to another node is spread; counted as the source's own."""
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
        """When each rank's message has left and the one to it has arrived; `ready_s` where there is neither.

        message_bytes: one number, or one for each message. ready_s: `[P]`, when each rank has what it sends.
        """
        stretch = _stretch(self._link_random, self._link_jitter, messages.latency_s.shape)
        port_s = message_bytes * messages.s_per_byte * stretch
        leaves_s = ready_s[messages.source]
        arrives_s = np.maximum(leaves_s + messages.latency_s * stretch, self._port_free_s[messages.port]) + port_s
        self._port_free_s[messages.port] = arrives_s
        np.add(messages.sent_bytes, message_bytes, out=messages.sent_bytes)
        done_s = ready_s.copy()
        done_s[messages.source] = leaves_s + port_s
        done_s[messages.target] = np.maximum(done_s[messages.target], arrives_s)
        return done_s

    def send_to_all(self, size: int, message_bytes: float, ready_s: Array) -> Array:
        """When each rank has sent to all others of its `size` neighbours (0 .. size - 1, and so on) and heard from all.

        Within the node. Rank r sends to r + 1, r + 2, ... in turn; the receiver's port takes them as they come.
        """
        P, others = self.ranks, np.arange(1, size)
        stretch = _stretch(self._link_random, self._link_jitter, (P, size - 1))
        port_s = np.full((P, size - 1), message_bytes / self.machine.inside.bytes_per_s) * stretch
        left_s = ready_s[:, None] + port_s.cumsum(1)
        heads_s = left_s - port_s + self.machine.inside.latency_s * stretch
        rank = np.arange(P)[:, None]
        source = rank // size * size + (rank - others) % size  # who sends to `rank` as its i-th
        heads_s, port_s = heads_s[source, others - 1], port_s[source, others - 1]
        order = heads_s.argsort(1)
        heads_s, port_s = np.take_along_axis(heads_s, order, 1), np.take_along_axis(port_s, order, 1)
        rest_s = port_s[:, ::-1].cumsum(1)[:, ::-1]  # this message and those behind it
        arrived_s = np.maximum((heads_s + rest_s).max(1), self._port_free_s[:P] + rest_s[:, 0])
        self._port_free_s[:P] = arrived_s
        self._sent_to_all_bytes += (size - 1) * message_bytes
        return np.maximum(left_s[:, -1], arrived_s)

    def sent_bytes(self) -> Array:
        """`[2, P]`: what each rank has sent inside its node and to other nodes."""
        sent = np.zeros((2, self.ranks))
        sent[0] += self._sent_to_all_bytes
        for messages in self._routes:
            sent[messages.across.astype(int), np.arange(self.ranks)[messages.source]] += messages.sent_bytes
        return sent


def _stretch(random: np.random.Generator, jitter: float, shape: tuple[int, ...]) -> Array | float:
    if not jitter:
        return 1.0
    drawn = random.standard_exponential(shape)
    drawn *= jitter
    drawn += 1
    return drawn


def _index(ranks: Ranks) -> Ranks | slice:
    start, stop = int(ranks[0]), int(ranks[-1]) + 1
    return slice(start, stop) if np.array_equal(ranks, np.arange(start, stop)) else ranks
