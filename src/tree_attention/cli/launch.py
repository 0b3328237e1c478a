"""Start ranks on this machine and end them all when one dies or the user stops; under torchrun, join its ranks."""

import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from ..errors import InputError, TreeAttentionError
from ..host import usable_cpus
from .terminal import RankDied, busy, end_process, under_torchrun

MODELS = f"{__package__}.models"  # what the ranks of `generate` and `chat` preload
RankFunction = Callable[..., int | None]  # returns an exit code, None for 0
FOLDER = "tree-attention-"  # in the folder for temporary files, then the number of the process that started the ranks
PRINTED = "printed"  # a file: a rank has printed what is wrong
RANKS_PER_CPU = 8
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 2.0  # from a rank's death until the others are killed
PEER_TIMEOUT = timedelta(minutes=10)  # for a slow peer; the process that started the ranks notices a dead one


def run_on_ranks(
    function: RankFunction,
    nproc: int | None,
    device: str,
    *args: Any,
    preload: str = __name__,
    on_start: Callable[[], None] | None = None,
    on_signal: Callable[[int, Any], None] | None = None,
) -> int:
    """Call `function(*args, device)` on `nproc` ranks of one process group. Under torchrun, be one of its ranks.

    `function` must be importable by name; it returns an exit code, None for 0. Returns the code of the first rank that
    ended with one, else 0. On CPUs the ranks are forks of this process, which first loads the module `preload`, since
    transformers takes seconds. A fork does not copy threads: start them in `on_start`. `on_signal` handles SIGINT,
    SIGTERM and SIGHUP in this process, and the ranks ignore them. Without it each of these signals ends all ranks.
    Raises InputError for an impossible `nproc` or `device`, RankDied if an unexpected error or a signal ended a rank;
    the others are terminated.
    """
    if under_torchrun():
        size = int(os.environ["WORLD_SIZE"])
        if nproc not in (None, size):
            raise InputError(f"nproc must be torchrun's {size} or left out, got {nproc}")
        local_device = _device(device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        return _run_rank(int(os.environ["RANK"]), size, None, local_device, function, args)
    size = 1 if nproc is None else nproc
    if size < 1:
        raise InputError(f"nproc must be at least 1, got {size}")
    devices = [_device(device, rank, size) for rank in range(size)]
    if devices[0].type == "cpu" and size > RANKS_PER_CPU * usable_cpus():
        most = RANKS_PER_CPU * usable_cpus()
        raise InputError(f"nproc may be at most {most}, {RANKS_PER_CPU} per CPU that this process may use, got {size}")
    _delete_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-") as folder:
        ignored = () if on_signal is None else SIGNALS
        arguments = (size, folder, devices, function, args, ignored)
        method = "spawn" if any(each.type == "cuda" for each in devices) else "fork"  # CUDA does not survive a fork
        if method == "fork":
            with busy("starting"):
                import_module(preload)
            gc.freeze()  # else collections of the forks copy this memory
        with _environment_of_ranks():
            context: Any = start_processes(_start, arguments, nprocs=size, join=False, start_method=method)
        before = {number: signal.getsignal(number) for number in (SIGNALS[1:] if on_signal is None else SIGNALS)}
        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:  # by nohup
                    signal.signal(number, on_signal or _exit)
            if on_start is not None:
                on_start()
            while not context.join(grace_period=GRACE_S):
                pass
        except (ProcessExitedException, ProcessRaisedException) as end:
            return _exit_code(end, context.processes, Path(folder))
        finally:
            for process in context.processes:
                process.kill()
            for file in filter(None, context.error_files):
                Path(file).unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def _delete_leftovers() -> None:
    """Delete the folders of commands that were killed by SIGKILL."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        process = folder.name.removeprefix(FOLDER).partition("-")[0]
        if process.isdecimal() and not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _exit(number: int, frame: Any) -> None:
    """End by a signal, but leave no rank and no file behind."""
    sys.exit(128 + number)


@contextlib.contextmanager
def _environment_of_ranks() -> Iterator[None]:
    """Ranks that start inside listen on the loopback interface alone, and import nothing from the current folder."""
    added = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "PYTHONSAFEPATH": "1"}
    added = {name: value for name, value in added.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if device == "cuda" and not enough:
        raise InputError(f"cuda needs a GPU for each of {local_size} ranks, found {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank) if enough and device != "cpu" else torch.device("cpu")


def _start(
    rank: int, size: int, folder: str, devices: list[torch.device], function: Any, args: tuple, ignored: tuple
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C end at once, without a traceback
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # when the parent ends; torch sets SIGINT, which may be ignored

    def call(*args: Any) -> int | None:
        try:
            return function(*args)
        except TreeAttentionError as error:  # printed by one rank, before the group ends and the others' calls fail
            with contextlib.suppress(FileExistsError):
                Path(folder, PRINTED).touch(exist_ok=False)
                os.write(2, f"tree-attention: {error}\n".encode())
            return 2

    end_process(_run_rank(rank, size, f"file://{folder}/rendezvous", devices[rank], call, args))


def _run_rank(rank: int, size: int, rendezvous: str | None, device: torch.device, function: Any, args: tuple) -> int:
    gc.enable()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(backend, rendezvous, PEER_TIMEOUT, world_size=size, rank=rank, device_id=device_id)
    except dist.DistError as error:
        if rendezvous is not None:
            raise
        # torchrun's port is in use, for example
        raise InputError(f"the ranks cannot meet: {error}") from None
    try:
        return function(*args, device) or 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def set_threads(ranks: int) -> None:
    """Give each of this host's ranks its share of the CPUs, unless the user sets OMP_NUM_THREADS. torchrun sets 1."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or (given == "1" and under_torchrun()):
        torch.set_num_threads(max(usable_cpus() // ranks, 1))


def _exit_code(end: ProcessExitedException | ProcessRaisedException, processes: list[Any], folder: Path) -> int:
    """Return the exit code of ranks that ended with one of ours; raise RankDied for any other end."""
    for rank, process in enumerate(processes):  # the killed rank, even if the failure of a peer was noticed first
        if process.exitcode == -signal.SIGINT:  # Ctrl-C goes to all processes, and to a rank perhaps first
            raise KeyboardInterrupt from None
        if process.exitcode is not None and process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            raise RankDied(f"rank {rank} was killed by {name}; the others were ended") from None
    if (folder / PRINTED).exists():
        return 2
    if isinstance(end, ProcessRaisedException):
        raise RankDied(f"rank {end.error_index} failed, the others were ended: {end.msg.strip()}") from None
    code = processes[end.error_index].exitcode
    if code in (1, 2):  # --verify found a difference; a chat could not be saved
        return code
    raise RankDied(f"rank {end.error_index} ended with code {code}; the others were ended") from None
