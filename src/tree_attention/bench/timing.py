"""Times work that all ranks run together, contestants in turn: in a CUDA graph, or call by call."""

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..group import first_fault

LEAD_CYCLES = 2_000_000  # about 1 ms, in which the host enqueues the timed work
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class CapturedCalls:
    """replay: replays a CUDA graph of calls. calls: they own memory of the graph. first: result of the first call."""

    replay: Callable[[], None]
    calls: Sequence[Callable[[], Tensor]]
    first: Tensor


Work = CapturedCalls | Callable[[], Any]  # a graph, or a function that launches the work


def median_seconds(works: Mapping[Name, Work], rounds: int) -> dict[Name, float]:
    """Return, for each work, the median over `rounds` of the slowest rank's time. All ranks call it, on GPUs."""
    rounds_s = [[_seconds(work) for work in works.values()] for _ in range(rounds + 1)][1:]  # less a warm-up
    slowest = torch.tensor(rounds_s, dtype=torch.float64, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: statistics.median(taken) for name, taken in zip(works, slowest.T.tolist(), strict=True)}


def waiting_seconds(calls: Sequence[Callable[[], Any]], rounds: int) -> float:
    """Return the seconds that a call would lose by always waiting for the slowest rank: the median over `rounds`.

    Measured on calls that do not wait: the mean over calls of the slowest rank's time, less the largest mean of a rank.
    """
    lost_s = []
    for _ in range(rounds):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        dist.barrier()
        torch.cuda._sleep(LEAD_CYCLES * len(calls))  # the device starts after the host has enqueued all
        events[0].record()
        for event, call in zip(events[1:], calls, strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        taken = torch.tensor([a.elapsed_time(b) / 1e3 for a, b in pairwise(events)], dtype=torch.float64, device="cuda")
        slower, mean = taken.clone(), taken.mean()
        dist.all_reduce(slower, dist.ReduceOp.MAX)
        dist.all_reduce(mean, dist.ReduceOp.MAX)
        lost_s.append(float(slower.mean() - mean))
    return statistics.median(lost_s)


def capture(calls: Sequence[Callable[[], Tensor]]) -> CapturedCalls | str:
    """Capture all calls, which have run before, in one graph; or return why a rank could not, on every rank."""
    graph, here, fault = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), None
    first: Any = None
    dist.barrier()
    try:
        # thread_local: NCCL's watchdog queries its events during the capture
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            first = calls[0]()
            for call in calls[1:]:
                call()
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # after a failed capture, torch leaves the capture stream current
        fault = f"not captured: {one_line(error)}"
    fault = first_fault(fault, dist.group.WORLD)
    return CapturedCalls(graph.replay, calls, first) if fault is None else fault


def restart_peak(device: torch.device) -> int | None:
    """Reset the peak of PyTorch's allocator and return the bytes allocated now; None on the CPU, which has no count."""
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def one_line(error: Exception) -> str:
    """The first line of the error's message, or the name of its type."""
    return next(iter(str(error).strip().splitlines()), "")[:160] or type(error).__name__


def _seconds(work: Work) -> float:
    """Time the work on this rank, after all ranks have met. A graph starts after the host has enqueued everything."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launch = work.replay if isinstance(work, CapturedCalls) else work
    dist.barrier()
    if isinstance(work, CapturedCalls):
        torch.cuda._sleep(LEAD_CYCLES)
        dist.all_reduce(torch.zeros(1, device="cuda"))  # the devices meet, not only the hosts
    else:
        torch.cuda.synchronize()
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
