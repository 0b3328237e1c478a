"""Start ranks on this machine and end them all when one dies or the user stops; under torchrun, join its ranks."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from ..errors import InputError, TreeAttentionError
from .terminal import RankDied, exit_rank, under_torchrun

GRACE_S = 2.0  # from a rank's death until the others are killed
PEER_TIMEOUT = timedelta(minutes=10)  # for a slow peer; the process that started the ranks notices a dead one


def run_on_ranks(
    function: Callable[..., int | None], nproc: int | None, device: str, *args: Any, preload: Sequence[str] = ()
) -> int:
    """Call `function(*args, device)` on `nproc` ranks of one process group. Under torchrun, be one of its ranks.

    `function` must be importable by name; it returns an exit code, None for 0. Returns the code of the first rank that
    ended with one, else 0. On CPUs the ranks are forked from a process that has loaded the modules in `preload`, since
    transformers takes seconds to load. Raises InputError for an impossible `nproc` or `device`, RankDied if an
    unexpected error or a signal ended a rank; the others are terminated.
    """
    size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else (1 if nproc is None else nproc)
    if size < 1:
        raise InputError(f"nproc must be at least 1, got {size}")
    if under_torchrun():
        if nproc not in (None, size):
            raise InputError(f"nproc must be torchrun's {size} or left out, got {nproc}")
        local_device = _device(device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        return _run_rank(int(os.environ["RANK"]), size, None, local_device, function, args)
    devices = [_device(device, rank, size) for rank in range(size)]
    with tempfile.TemporaryDirectory(prefix="tree-attention-") as folder:
        arguments = (size, f"file://{folder}/rendezvous", devices, function, args)
        # A process that has initialized CUDA cannot be forked.
        method = "spawn" if any(each.type == "cuda" for each in devices) else "forkserver"
        set_forkserver_preload([__name__, function.__module__, *preload])
        context: Any = start_processes(_start, arguments, nprocs=size, join=False, start_method=method)
        try:
            while not context.join(grace_period=GRACE_S):
                pass
        except (ProcessExitedException, ProcessRaisedException) as end:
            return _exit_code(end, context.processes)
        finally:
            for process in context.processes:
                process.kill()
    return 0


def _device(device: str, local_rank: int, local_size: int) -> torch.device:
    """Return the device of a rank."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if device == "cuda" and not enough:
        raise InputError(f"cuda needs a GPU for each of {local_size} ranks, found {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank) if enough and device != "cpu" else torch.device("cpu")


def _start(rank: int, size: int, rendezvous: str, devices: list[torch.device], function: Any, args: tuple) -> None:
    """Run one rank in a new process, and exit with its code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C end at once, without a traceback
    try:
        code = _run_rank(rank, size, rendezvous, devices[rank], function, args)
    except TreeAttentionError as error:  # usually raised on all ranks: the first one prints it
        with contextlib.suppress(FileExistsError):
            Path(rendezvous.removeprefix("file://")).with_name("printed").touch(exist_ok=False)
            os.write(2, f"tree-attention: {error}\n".encode())
        code = 2
    exit_rank(code)


def _run_rank(rank: int, size: int, rendezvous: str | None, device: torch.device, function: Any, args: tuple) -> int:
    """Call the function within the process group. Returns its exit code."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif size > 1:
        torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, init_method=rendezvous, rank=rank, world_size=size, timeout=PEER_TIMEOUT, device_id=device_id
    )
    try:
        return function(*args, device) or 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _exit_code(end: ProcessExitedException | ProcessRaisedException, processes: list[Any]) -> int:
    """Return the exit code of ranks that ended with one of ours; raise RankDied for any other end."""
    for rank, process in enumerate(processes):  # the killed rank, even if the failure of a peer was noticed first
        if process.exitcode == -signal.SIGINT:  # Ctrl-C goes to all processes, and to a rank perhaps first
            raise KeyboardInterrupt from None
        if process.exitcode is not None and process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            raise RankDied(f"rank {rank} was killed by {name}; the others were ended") from None
    if isinstance(end, ProcessRaisedException):
        raise RankDied(f"rank {end.error_index} failed, the others were ended: {end.msg.strip()}") from None
    code = processes[end.error_index].exitcode
    if code in (1, 2):  # --verify found a difference, or an error that the rank has printed
        return code
    raise RankDied(f"rank {end.error_index} ended with code {code}; the others were ended") from None
