"""Seconds of what all ranks do at once, contestants in turn: captured in a CUDA graph, or called one by one."""

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..group import first_fault

LEAD_CYCLES = 2_000_000  # about 1 ms, in which the host hands in what is timed
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class TimedWork:
    """enqueue: hands work to the device. ahead: the host is to be done with that before the device begins (a graph)."""

    enqueue: Callable[[], Any]
    ahead: bool


@dataclass(frozen=True)
class CapturedCalls:
    """calls: kept, since they own memory that the graph uses. first: the first one's result, of the last replay."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Callable[[], Tensor]]
    first: Tensor

    def replay(self) -> None:
        self.graph.replay()


def seconds_in_turns(runs: Mapping[Name, TimedWork], rounds: int) -> dict[Name, float]:
    """Each run's time: of a turn that of the slowest rank, of `rounds` turns the median, one before them not counted.

    All ranks call it with the same runs, on CUDA devices.
    """
    turns = [[_turn(run) for run in runs.values()] for _ in range(rounds + 1)][1:]
    slowest = torch.tensor(turns, dtype=torch.float64, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: statistics.median(taken) for name, taken in zip(runs, slowest.T.tolist(), strict=True)}


def waiting_seconds(calls: Sequence[Callable[[], Any]], rounds: int) -> float:
    """What a call loses if it always waits for the slower rank, measured on calls that do not; the median of `rounds`.

    That is the mean over calls of the slower rank's time, less the slower rank's mean.
    """
    return statistics.median(_waiting_seconds(calls) for _ in range(rounds))


def _waiting_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    dist.barrier()
    torch.cuda._sleep(LEAD_CYCLES * len(calls))  # the host is done before the device begins
    events[0].record()
    for event, call in zip(events[1:], calls, strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    taken = torch.tensor([a.elapsed_time(b) / 1e3 for a, b in pairwise(events)], dtype=torch.float64, device="cuda")
    slower, mean = taken.clone(), taken.mean()
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    dist.all_reduce(mean, dist.ReduceOp.MAX)
    return float(slower.mean() - mean)


def capture(calls: Sequence[Callable[[], Tensor]]) -> CapturedCalls | str:
    """One graph of all calls, each of which ran before; or on every rank why one of them could not."""
    graph, first, fault = torch.cuda.CUDAGraph(), None, None
    dist.barrier()
    here = torch.cuda.current_stream()
    try:
        # thread_local: NCCL's watchdog looks at its events meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            first = calls[0]()
            for call in calls[1:]:
                call()
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # torch leaves a stream that it could not capture current
        fault = f"not captured: {one_line(error)}"
    fault = first_fault(fault, dist.group.WORLD)
    if fault is not None or first is None:
        return fault or "not captured"
    return CapturedCalls(graph, calls, first)


def one_line(error: Exception) -> str:
    """The first line of what it says, or else its name."""
    return next(iter(str(error).strip().splitlines()), "")[:160] or type(error).__name__


def _turn(run: TimedWork) -> float:
    """This rank's seconds, from a moment at which all ranks are there."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    if run.ahead:
        torch.cuda._sleep(LEAD_CYCLES)
        dist.all_reduce(torch.zeros(1, device="cuda"))  # the devices open_communicators, not only the hosts
    else:
        torch.cuda.synchronize()
    start.record()
    run.enqueue()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
