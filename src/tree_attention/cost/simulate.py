"""Decode steps of attention on a cluster that is not at hand: every kernel and every message, rank by rank.

Modelled: each rank reads its own keys (in a ragged batch ranks have different numbers of them, a straggler is slower,
kernels jitter), then the exchange of exchange.py runs message by message over the ports of cluster.py. A rank goes on
as soon as it has what it needs: no barrier stands between rounds, layers or steps, so ranks drift apart, and delays
hide each other or add up as they would. One stream a GPU; a ring's messages go beside it.

Not modelled: switches and routes (between any two ports lies a path of their own), memory bandwidth that messages take
from kernels, NCCL's choice among its algorithms and protocols, the host, prefill, and what a layer does besides
attention (`beside_s` stands for it).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .cluster import Array, Cluster
from .decode import Shape, decode_cost
from .exchange import ring, stages
from .machine import Machine

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """A batch of sequences of different lengths, padded on the left to the longest, each step a token longer.

    lengths: tokens of each, over all ranks. block: slots in a block of the block-cyclic layout (layout.py), in which
    block b lies on rank b % P; None for the contiguous one: slots cut into P equal parts at the first step, new tokens
    on the last rank.
    """

    lengths: tuple[int, ...]
    block: int | None = 64

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0 or (self.block is not None and self.block < 1):
            raise ValueError(f"lengths must be at least 0 and block at least 1, got {self.lengths} and {self.block}")

    def keys(self, ranks: int, step: int) -> Array:
        """`[P]`: how many keys of all sequences together each rank holds at a step."""
        stop, rank = max(self.lengths), np.arange(ranks)
        starts = stop - np.array(self.lengths)[:, None]
        if self.block is None:
            part = -(-stop // ranks)
            held = np.clip(stop - rank * part, 0, part) - np.clip(starts - rank * part, 0, part)
            return held.sum(0) + step * len(self.lengths) * (rank == ranks - 1.0)
        held = _before(stop + step, rank, ranks, self.block) - _before(starts, rank, ranks, self.block)
        return held.sum(0) * 1.0


@dataclass(frozen=True)
class Run:
    """What a simulation found.

    step_s: `[steps]`, by how much the rank that is last at the end of a step is later than the last one before it.
    end_s: `[P]`, when each rank has its last result, counted from the start of the first step.
    sent_bytes: `[2, P]`, of all steps, over the links inside a node and over those to other nodes.
    """

    step_s: Array
    end_s: Array
    sent_bytes: Array

    @property
    def mean_s(self) -> float:
        return float(self.step_s.mean())

    def quantile_s(self, share: float) -> float:
        """0.5: the median; 0.99: what one step of a hundred exceeds."""
        return float(np.quantile(self.step_s, share))


def simulate(
    shape: Shape,
    machine: Machine,
    ranks: int,
    algorithm: str,
    *,
    steps: int = 1,
    layers: int = 1,
    beside_s: float = 0.0,
    seed: int = 0,
    kernel_jitter: float = 0.0,
    link_jitter: float = 0.0,
    stragglers: Mapping[int, float] | None = None,
    ragged: Ragged | None = None,
) -> Run:
    """Simulate `steps` decode steps of `layers` layers on `ranks` GPUs, whole nodes of the machine or one part of one.

    Args:
        shape: its keys, one number or one a rank, hold at every step; `ragged` replaces them.
        algorithm: one of decode.ALGORITHMS.
        beside_s: what every rank does in a layer before the attention.
        seed: the same gives the same numbers, bit for bit.
        kernel_jitter, link_jitter: each kernel, each message takes (1 + jitter Exp(1)) times as long.
        stragglers: rank -> how many times as long its kernels take.
        ragged: lengths of `shape.batch` sequences and where their tokens lie.

    Raises ValueError for what decode_cost refuses, for parts of several nodes, for a negative number of anything, and
    for lengths or stragglers that do not fit.
    """
    least_zero = (ranks - 1, steps - 1, layers - 1, beside_s, kernel_jitter, link_jitter)
    _check(machine, ranks, ragged, shape.batch, stragglers, least_zero)
    if ragged is not None:
        shape = replace(shape, keys=tuple(ragged.keys(ranks, 0) / shape.batch))
    decode_cost(shape, machine, ranks, algorithm)  # refuses what makes no sense of the rest
    cluster = Cluster(
        machine, ranks, seed=seed, kernel_jitter=kernel_jitter, link_jitter=link_jitter, stragglers=stragglers
    )
    around = ring(cluster) if algorithm == "ring" and ranks > 1 else None
    exchange = stages(algorithm, cluster, shape.rows, shape.value_dim) if around is None else []
    one = replace(shape, keys=1.0)
    key_s = max(one.kv_bytes / machine.gpu.read_bytes_per_s, one.flops / machine.gpu.matmul_flops_per_s)
    keys = np.broadcast_to(np.array(shape.keys, float), ranks)
    ready_s, ends_s = np.zeros(ranks), np.zeros(steps + 1)
    for step in range(steps):
        if ragged is not None:
            keys = ragged.keys(ranks, step) / shape.batch
        for _ in range(layers):
            if beside_s:
                ready_s = cluster.kernel(beside_s, ready_s)
            if around is not None:
                ready_s = around(keys * one.kv_bytes, keys * key_s, ready_s)
                continue
            ready_s = cluster.kernel(machine.gpu.launch_s + keys * key_s, ready_s)
            for stage in exchange:
                ready_s = stage(ready_s)
        ends_s[step + 1] = ready_s.max()
    return Run(np.diff(ends_s), ready_s, cluster.sent_bytes())


def _before(slot: Slots | int, rank: Slots, ranks: int, block: int) -> Slots:
    """How many of the slots before `slot` each rank holds: `Layout.local_length`."""
    cycle = ranks * block
    return slot // cycle * block + np.clip(slot % cycle - rank * block, 0, block)


def _check(
    machine: Machine,
    ranks: int,
    ragged: Ragged | None,
    batch: int,
    stragglers: Mapping[int, float] | None,
    least_zero: tuple[float, ...],
) -> None:
    if min(least_zero) < 0:
        raise ValueError("ranks, steps and layers must be at least 1, beside_s and both jitters at least 0")
    if ranks > machine.per_node and ranks % machine.per_node:
        raise ValueError(f"several nodes must be whole: {machine.per_node} GPUs each, got {ranks} ranks")
    if ragged is not None and len(ragged.lengths) != batch:
        raise ValueError(f"a batch of {batch} needs as many lengths, got {len(ragged.lengths)}")
    for rank, factor in (stragglers or {}).items():
        if not 0 <= rank < ranks or factor <= 0:
            raise ValueError(f"stragglers are ranks of 0 .. {ranks - 1} and factors above 0, got {rank}: {factor}")
