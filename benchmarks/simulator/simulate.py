"""Simulates decode steps of attention on a cluster: every kernel and every message of every rank.

Modelled: each rank reads its own keys (their number differs between ranks in a ragged batch, stragglers are slower,
kernels jitter). Then the exchange of rounds.py runs message by message over the ports of cluster.py. A rank continues
as soon as its inputs are there: no barrier separates rounds, layers or steps. Ranks drift apart, and delays hide
each other or add up. Each GPU has one stream; the messages of a ring run in parallel to it.

Not modelled: switches and routes (any two ports have a path of their own), memory bandwidth that messages take from
kernels, NCCL's choice of algorithm and protocol, the host, prefill, and the rest of a layer (`beside_s` stands for it).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tree_attention.cost.decode import AttentionShape, decode_cost
from tree_attention.cost.machine import Machine

from .cluster import Array, Cluster
from .rounds import ring, stages

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """A batch of sequences of different lengths, padded on the left to the longest. Each step adds one token to each.

    lengths: tokens per sequence, over all ranks. block: slots per block of the block-cyclic layout (layout.py), in
    which block b is stored on rank b % P. None: the contiguous layout, in which the slots are split into P equal parts
    at the first step and new tokens are stored on the last rank.
    """

    lengths: tuple[int, ...]
    block: int | None = 64

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0 or (self.block is not None and self.block < 1):
            raise ValueError(f"lengths must be at least 0 and block at least 1, got {self.lengths} and {self.block}")

    def keys(self, ranks: int, step: int) -> Array:
        """`[P]`: number of keys that each rank holds at a step, over all sequences."""
        stop, rank = max(self.lengths), np.arange(ranks)
        starts = stop - np.array(self.lengths)[:, None]
        if self.block is None:
            part = -(-stop // ranks)
            held = np.clip(stop - rank * part, 0, part) - np.clip(starts - rank * part, 0, part)
            return held.sum(0) + step * len(self.lengths) * (rank == ranks - 1.0)
        held = _before(stop + step, rank, ranks, self.block) - _before(starts, rank, ranks, self.block)
        return held.sum(0) * 1.0


@dataclass(frozen=True)
class SimulationResult:
    """Times and bytes of a simulation.

    step_s: `[steps]`, time between the ends of consecutive steps on their slowest ranks. end_s: `[P]`, when each rank
    has its last result, counted from the start of the first step. sent_bytes: `[2, P]`, over all steps, within the
    node and to other nodes.
    """

    step_s: Array
    end_s: Array
    sent_bytes: Array

    @property
    def mean_s(self) -> float:
        return float(self.step_s.mean())

    def quantile_s(self, share: float) -> float:
        """Quantile of the step times; 0.5: the median."""
        return float(np.quantile(self.step_s, share))


def simulate(
    shape: AttentionShape,
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
) -> SimulationResult:
    """Simulate `steps` decode steps of `layers` layers on `ranks` GPUs: whole nodes, or a part of one node.

    Args:
        shape: its keys, one number or one per rank, apply to every step; `ragged` replaces them.
        algorithm: one of decode.ALGORITHMS.
        beside_s: time of the rest of each layer, before its attention, on every rank.
        seed: the same seed gives the same numbers, bit for bit.
        kernel_jitter, link_jitter: the time of each kernel, of each message is multiplied by 1 + jitter Exp(1).
        stragglers: rank -> factor by which its kernels take longer.
        ragged: lengths of the `shape.batch` sequences and the layout of their tokens.

    Raises ValueError for the inputs that decode_cost refuses, for several incomplete nodes, for negative numbers, and
    for lengths or stragglers that do not match the batch or the ranks.
    """
    least_zero = (ranks - 1, steps - 1, layers - 1, beside_s, kernel_jitter, link_jitter)
    _check(machine, ranks, ragged, shape.batch, stragglers, least_zero)
    if ragged is not None:
        shape = replace(shape, keys=tuple(ragged.keys(ranks, 0) / shape.batch))
    decode_cost(shape, machine, ranks, algorithm)  # checks the remaining arguments
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
    return SimulationResult(np.diff(ends_s), ready_s, cluster.sent_bytes())


def _before(slot: Slots | int, rank: Slots, ranks: int, block: int) -> Slots:
    """Number of slots before `slot` on each rank, as `Layout.local_length`."""
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
        raise ValueError(f"several nodes must be complete ({machine.per_node} GPUs each), got {ranks} ranks")
    if ragged is not None and len(ragged.lengths) != batch:
        raise ValueError(f"a batch of {batch} needs as many lengths, got {len(ragged.lengths)}")
    for rank, factor in (stragglers or {}).items():
        if not 0 <= rank < ranks or factor <= 0:
            raise ValueError(
                f"stragglers must be ranks from 0 to {ranks - 1} with positive factors, got {rank}: {factor}"
            )
