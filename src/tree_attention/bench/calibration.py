"""The constants of cost/machine.py, measured on the ranks that call it: GPUs in CUDA graphs, CPUs call by call."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
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
from .timing import CapturedCalls, TimedWork, capture, seconds_in_turns

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROUNDS = 7
SMALLEST_S = 1e-9  # where a difference of two measurements comes out below zero


@torch.no_grad()
def calibrate(device: torch.device) -> Machine:
    """This machine's constants, the same on every rank; all ranks of one host call it, at least two.

    The link between nodes cannot be measured on one: it is the preset of an H100 node, and its source says so.
    """
    on_gpu = device.type == "cuda"
    big_bytes, small_bytes, keys = (1 << 32, 16 << 10, 16384) if on_gpu else (1 << 27, 16 << 10, 1024)
    read_bytes_per_s = big_bytes / _seconds(_reads(big_bytes, device), device)
    tiny = torch.zeros(64, device=device)
    kernel_s = _seconds([lambda: tiny.add_(1)] * 64, device)
    decodes, decode_bytes = _decodes(keys, device)
    launch_s = max(_seconds(decodes, device) - decode_bytes / read_bytes_per_s, kernel_s)
    width = 8192 if on_gpu else 1024
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32) for _ in "ab")
    multiply_s = _seconds([lambda: a @ b] * 4, device)
    gpu = GpuSpec(
        _name(device), _memory_bytes(device), read_bytes_per_s, 2 * width**3 / multiply_s, launch_s, kernel_s,
        f"measured: a read of {big_bytes >> 20} MiB; a decode step of {decode_bytes >> 20} MiB of keys and values less "
        f"its read; a small kernel; a product of {width} x {width} matrices",
    )  # fmt: skip
    return Machine(_name(device), gpu, _link(big_bytes, small_bytes, kernel_s, device), _across(), _per_node(device))


def _reads(size_bytes: int, device: torch.device) -> list[Callable[[], Any]]:
    """Steps that read so many bytes, far more than caches hold."""
    words = torch.ones(size_bytes // 4, dtype=torch.int32, device=device)
    if device.type == "cpu":
        return [words.view(torch.float32).sum]
    from .peers import streaming_read

    return [streaming_read(words, block_bytes=65536, programs_per_sm=2, num_warps=8)] * 4


def _decodes(keys: int, device: torch.device) -> tuple[list[Callable[[], Any]], int]:
    """Decode steps without an exchange over several sets in turn, and the bytes of one."""
    how: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    q = torch.randn(1, 1, HEADS, HEAD_DIM, **how)
    sets = [[torch.randn(1, KV_HEADS, keys, HEAD_DIM, **how).transpose(1, 2) for _ in "kv"] for _ in range(8)]
    read_bytes = sum(t.nbytes for t in sets[0])
    return [lambda kv=kv: attend(q, *kv).out for kv in sets], read_bytes


def _link(big_bytes: int, small_bytes: int, kernel_s: float, device: torch.device) -> LinkSpec:
    size = dist.get_world_size()
    sent_bytes = big_bytes // 4
    move_s = _seconds([_shift(sent_bytes, device)] * 2, device)
    latency_s, how = _latency(kernel_s, device)
    small = torch.zeros(small_bytes // 4, device=device)
    world: Any = dist.group.WORLD
    collective_s = _seconds([lambda: gather(small, world)] * 16, device) - (size - 2) * latency_s
    return LinkSpec(
        "measured", sent_bytes / move_s, latency_s, max(collective_s, latency_s),
        f"measured with {size} ranks: each sends {sent_bytes >> 20} MiB to the next; {how}; an all-gather of 16 KiB",
        peer_access=how.startswith("SymmetricLink"),
    )  # fmt: skip


def _latency(kernel_s: float, device: torch.device) -> tuple[float, str]:
    """Seconds of a small message, and by what it was measured: the exchange kernel where there can be one."""
    if device.type == "cuda":
        try:
            link = SymmetricLink(rows=HEADS, head_dim=HEAD_DIM)
        except Unavailable as obstacle:  # on every rank alike
            note = f"a small send and receive, since SymmetricLink is unavailable ({obstacle})"
        else:
            part = Partial(torch.zeros(1, 1, HEADS, HEAD_DIM, device=device), torch.zeros(1, 1, HEADS, device=device))
            exchange_s = _seconds([lambda: link.reduce(part).out] * 16, device)
            link.check()
            return max(exchange_s - kernel_s, SMALLEST_S), "SymmetricLink's exchange of 16 KiB less a small kernel"
    else:
        note = "a small send and receive"
    return max(_seconds([_shift(1 << 10, device)] * 16, device) - kernel_s, SMALLEST_S), note


def _shift(size_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A step in which every rank sends so many bytes to the next one."""
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
    """Of one step: the slowest rank's, the median of ROUNDS rounds, the steps having run before."""
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = capture(steps)
        if not isinstance(graph, CapturedCalls):
            raise Unavailable(f"calibrate times CUDA graphs: {graph}")
        return seconds_in_turns({0: TimedWork(graph.replay, ahead=True)}, ROUNDS)[0] / len(steps)
    turns = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        for step in steps:
            step()
        turns.append((time.perf_counter() - start) / len(steps))
    slowest = torch.tensor(turns, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _across() -> LinkSpec:
    preset = preset_machine("h100").across
    return LinkSpec(
        preset.name,
        preset.bytes_per_s,
        preset.latency_s,
        preset.collective_s,
        f"not measured, a preset: {preset.source}",
    )


def _per_node(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else dist.get_world_size()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _memory_bytes(device: torch.device) -> float:
    """Of the GPU; of a CPU rank its share."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / dist.get_world_size()
