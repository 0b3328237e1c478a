"""Start ranks on this machine, and end them all when one dies or the user stops; under torchrun, join instead."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from ..errors import InputError, TreeAttentionError
from .exits import RankDied, leave, under_torchrun

GRACE_S = 2.0  # between a rank's death and the end of the others
PEER_TIMEOUT = timedelta(minutes=10)  # for a peer that is slow; a dead one is noticed by whoever started it


def run_on_ranks(function: Callable[..., int | None], nproc: int | None, device: str, *args: Any) -> int:
    """Call `function(*args, device)` on `nproc` ranks of one process group; returns the first rank's exit code.

    function must be importable; device is "cpu", "cuda" or "auto", and comes back as the rank's own torch.device. With
    torchrun's environment this process is one of the ranks. Raises InputError for an impossible `nproc`, RankDied
    when a rank ends with an error or a signal, after the others were ended.
    """
    size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else (1 if nproc is None else nproc)
    if size < 1:
        raise InputError(f"nproc must be at least 1, got {size}")
    if under_torchrun():
        if nproc not in (None, size):
            raise InputError(f"nproc must be torchrun's {size} or left out, got {nproc}")
        rank, local_size = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return _rank(rank, size, None, _device(device, int(os.environ["LOCAL_RANK"]), local_size), function, args) or 0
    devices = [_device(device, rank, size) for rank in range(size)]
    with tempfile.TemporaryDirectory(prefix="tree-attention-") as folder:
        context = start_processes(
            _start, (size, f"file://{folder}/meeting", devices, function, args), nprocs=size, join=False
        )
        assert context is not None
        processes: list[Any] = context.processes
        try:
            while not context.join(grace_period=GRACE_S):
                pass
        except (ProcessExitedException, ProcessRaisedException) as end:
            return _exit_code(end, processes)
        finally:
            for process in processes:
                process.kill()
    return 0


def _start(rank: int, size: int, meeting: str, devices: list[torch.device], function: Any, args: tuple) -> None:
    """What a new process runs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, and the parent's death: end at once and without a word
    try:
        code = _rank(rank, size, meeting, devices[rank], function, args)
    except TreeAttentionError as error:  # as a rule raised on all ranks alike: one of them says it
        with contextlib.suppress(FileExistsError):
            Path(meeting.removeprefix("file://")).with_name("said").touch(exist_ok=False)
            os.write(2, f"tree-attention: {error}\n".encode())
        code = 2
    leave(code or 0)


def _rank(rank: int, size: int, meeting: str | None, device: torch.device, function: Any, args: tuple) -> int | None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif size > 1:
        torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=size, timeout=PEER_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )  # fmt: skip
    try:
        return function(*args, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if device == "cuda" and not enough:
        raise InputError(f"cuda needs a GPU for each of {local_size} ranks, found {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank) if enough and device != "cpu" else torch.device("cpu")


def _exit_code(end: ProcessExitedException | ProcessRaisedException, processes: list[Any]) -> int:
    """The code of ranks that ended alike after saying why, or RankDied about the rank that ended first.

    A rank that SIGINT ended is a KeyboardInterrupt: Ctrl-C is for all, and a rank's end may be noticed before our own.
    """
    for rank, process in enumerate(processes):  # its peers fail too, on a closed connection, maybe noticed before it
        if process.exitcode == -signal.SIGINT:
            raise KeyboardInterrupt from None
        if process.exitcode is not None and process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            raise RankDied(f"rank {rank} was killed by {name}; the others were ended") from None
    if isinstance(end, ProcessRaisedException):
        raise RankDied(f"rank {end.error_index} failed, the others were ended: {end.msg.strip()}") from None
    code = processes[end.error_index].exitcode
    if code in (1, 2):
        return code
    raise RankDied(f"rank {end.error_index} ended with code {code}; the others were ended") from None
