"""Measures the constants of cost/machine.py on the calling ranks: GPUs in CUDA graphs, CPUs call by call."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cost.machine import GpuSpec, LinkSpec, Machine, preset_machine
from ..errors import Unavailable
from ..local import attend
from ..partial import Partial
from ..reduce import SymmetricLink
from ..reduce.collectives import gather
from .timing import CapturedCalls, capture, median_seconds

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROUNDS = 7
SMALLEST_S = 1e-9  # used if a difference of two measurements is negative


@torch.no_grad()
def measure_machine(device: torch.device) -> Machine:
    """Return the constants of this host, the same on every rank. At least two ranks, all on this host, call it.

    The link between nodes cannot be measured on one host: it is the preset of an H100 node, and its source says so.
    """
    on_gpu = device.type == "cuda"
    big_bytes, keys, width = (1 << 32, 16384, 8192) if on_gpu else (1 << 27, 1024, 1024)
    read_bytes_per_s = big_bytes / _seconds(_reads(big_bytes, device), device)
    tiny = torch.zeros(64, device=device)
    kernel_s = _seconds([lambda: tiny.add_(1)] * 64, device)
    decodes, decode_bytes = _decodes(keys, device)
    launch_s = max(_seconds(decodes, device) - decode_bytes / read_bytes_per_s, kernel_s)
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32) for _ in "ab")
    multiply_s = _seconds([lambda: a @ b] * 4, device)
    source = (
        f"measured: a read of {big_bytes >> 20} MiB; a decode step of {decode_bytes >> 20} MiB of keys and values less "
        f"its read; a small kernel; a product of {width} x {width} matrices"
    )
    rates = (read_bytes_per_s, 2 * width**3 / multiply_s)
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes, per_node = properties.name, float(properties.total_memory), torch.cuda.device_count()
    else:  # a CPU rank's share of the host memory
        name, per_node = "cpu", dist.get_world_size()
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node
    gpu = GpuSpec(name, memory_bytes, *rates, launch_s, kernel_s, source)
    preset = preset_machine("h100").across
    across = replace(preset, source=f"not measured, a preset: {preset.source}")
    return Machine(name, gpu, _link(big_bytes, kernel_s, device), across, per_node)


def _reads(size_bytes: int, device: torch.device) -> list[Callable[[], Any]]:
    """Steps that each read `size_bytes`, far more than the caches hold."""
    words = torch.ones(size_bytes // 4, dtype=torch.int32, device=device)
    if device.type == "cpu":
        return [words.view(torch.float32).sum]
    from .peers import streaming_read

    return [streaming_read(words, block_bytes=65536, programs_per_sm=2, num_warps=8)] * 4


def _decodes(keys: int, device: torch.device) -> tuple[list[Callable[[], Any]], int]:
    """Decode steps without an exchange, each on another set of keys and values, and the bytes of one step."""
    how: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    q = torch.randn(1, 1, HEADS, HEAD_DIM, **how)
    sets = [[torch.randn(1, KV_HEADS, keys, HEAD_DIM, **how).transpose(1, 2) for _ in "kv"] for _ in range(8)]
    read_bytes = sum(t.nbytes for t in sets[0])
    return [lambda kv=kv: attend(q, *kv).out for kv in sets], read_bytes


def _link(big_bytes: int, kernel_s: float, device: torch.device) -> LinkSpec:
    size, sent_bytes, small = dist.get_world_size(), big_bytes // 4, torch.zeros((16 << 10) // 4, device=device)
    world: Any = dist.group.WORLD
    move_s = _seconds([_shift(sent_bytes, device)] * 2, device)
    latency_s, how = _latency(kernel_s, device)
    collective_s = _seconds([lambda: gather(small, world)] * 16, device) - (size - 2) * latency_s
    sent = f"each sends {sent_bytes >> 20} MiB to the next"
    source = f"measured with {size} ranks: {sent}; {how}; an all-gather of 16 KiB"
    times_s, peer_access = (latency_s, max(collective_s, latency_s)), how.startswith("SymmetricLink")
    return LinkSpec("measured", sent_bytes / move_s, *times_s, source, peer_access)


def _latency(kernel_s: float, device: torch.device) -> tuple[float, str]:
    """Seconds of a small message, and how it was measured: with the exchange kernel if SymmetricLink is available."""
    note = "a small send and receive"
    if device.type == "cuda":
        try:
            link = SymmetricLink(rows=HEADS, head_dim=HEAD_DIM)
        except Unavailable as obstacle:  # the same on every rank
            note += f", since SymmetricLink is unavailable ({obstacle})"
        else:
            part = Partial(torch.zeros(1, 1, HEADS, HEAD_DIM, device=device), torch.zeros(1, 1, HEADS, device=device))
            exchange_s = _seconds([lambda: link.reduce(part).out] * 16, device)
            link.check()
            return max(exchange_s - kernel_s, SMALLEST_S), "SymmetricLink's exchange of 16 KiB less a small kernel"
    return max(_seconds([_shift(1 << 10, device)] * 16, device) - kernel_s, SMALLEST_S), note


def _shift(size_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A step in which every rank sends `size_bytes` to the next rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out = torch.zeros(size_bytes // 4, device=device)
    came = torch.empty_like(out)
    pair = [dist.P2POp(dist.isend, out, (rank + 1) % size), dist.P2POp(dist.irecv, came, (rank - 1) % size)]

    def step() -> Tensor:
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        return came

    return step


def _seconds(steps: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Seconds per step: the median over ROUNDS rounds of the slowest rank's time, after a warm-up."""
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = capture(steps)
        if not isinstance(graph, CapturedCalls):
            raise Unavailable(f"calibrate needs CUDA graphs: {graph}")
        return median_seconds({0: graph}, ROUNDS)[0] / len(steps)
    rounds_s = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        for step in steps:
            step()
        rounds_s.append((time.perf_counter() - start) / len(steps))
    slowest = torch.tensor(rounds_s, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())
