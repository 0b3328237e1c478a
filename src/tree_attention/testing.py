"""For tests, ours and users': a float64 oracle, peaked inputs, an error budget, ranks, a record of traffic."""

import gc
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .local import attend
from .partial import Partial

POOL_TIMEOUT = timedelta(seconds=120)


def oracle(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Partial:
    """What `attend` must give for these (unsharded) tensors: the reference backend in float64."""
    return attend(q.double(), k.double(), v.double(), **how, backend="reference")


def peaked_inputs(
    *, B: int = 2, T: int = 1, S: int = 64, H: int = 8, H_kv: int = 2, D: int = 32, D_v: int | None = None,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v in which each query puts much of its weight on a few keys.

    On white noise the softmax is so flat that even a merge that ignores lse stays within a usual tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, T, H, D, generator=generator)
    k = torch.randn(B, S, H_kv, D, generator=generator)
    v = torch.randn(B, S, H_kv, D_v or D, generator=generator)
    if S:  # every query gets one key that points its way
        heavy = torch.randint(S, (B, T, H), generator=generator)
        batch, _, head = torch.meshgrid(*map(torch.arange, (B, T, H)), indexing="ij")
        row = (batch * S + heavy) * H_kv + head // (H // H_kv)
        # one after the other: with k[...] += q, which threads share out, ranks would draw different keys
        k.view(-1, D).index_add_(0, row.flatten(), q.view(-1, D))
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def assert_within_rounding(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The error of `actual` is at most twice that of `plain`, PyTorch's own in the same dtype, plus one rounding.

    exact: float64. All three of one shape; everything finite.
    """
    error = (actual.double() - exact).abs().max()
    budget = 2 * (plain.double() - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs().max()
    assert actual.isfinite().all(), "not finite"
    assert error <= budget, f"error {error:.2e} > budget {budget:.2e}"


class Call(NamedTuple):
    """One communication call of this rank: the c10d operator's name, and the bytes handed to it (recv: received)."""

    name: str
    bytes: int


@contextmanager
def record_traffic() -> Iterator[list[Call]]:
    """`with record_traffic() as calls:` fills the list with a `Call` for each communication call of this rank."""
    with _Recorder() as recorder:
        yield recorder.calls


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            in_place = func._schema.arguments[0].name == "tensors"  # else: (output, input, ...)
            sent = args[0] if in_place else args[1]
            tensors = sent if isinstance(sent, list | tuple) else [sent]
            nbytes = sum(t.nbytes for t in tensors if isinstance(t, Tensor))  # a barrier has none
            self.calls.append(Call(func._schema.name.removeprefix("c10d::").strip("_"), nbytes))
        return func(*args, **(kwargs or {}))


class RankPool:
    """Processes that are started once and then run many functions, since starting them dominates a test's time.

    `pool.run(function, *args, ranks=3)` calls `function(group, *args)` on ranks 0 to 2, with a new process group of
    these three, and returns the results in rank order. `function` must be importable from its module. If a rank raises,
    the pool is closed, because other ranks may be waiting for it; the error is raised here, and the next `run` starts
    new processes.

    Args:
        size: number of processes.
        backend: "gloo", or "nccl": then each rank's current device is the GPU of its number.
        preload: modules that take long to load. With "gloo", ranks are forked from a process that has loaded them; only
            the first pool of a program decides which.
    """

    def __init__(self, size: int, backend: str = "gloo", preload: Sequence[str] = (__name__,)) -> None:
        self.size, self.backend, self.preload = size, backend, preload
        self._ranks: list[ProcessPoolExecutor] = []

    def run(self, function: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        if not self._ranks:
            # A process that has initialized CUDA cannot be forked.
            context = multiprocessing.get_context("spawn" if self.backend == "nccl" else "forkserver")
            context.set_forkserver_preload(list(self.preload))
            meeting = f"file://{tempfile.mkdtemp()}/meeting"
            for rank in range(self.size):
                arguments = (rank, self.size, self.backend, meeting)
                self._ranks.append(ProcessPoolExecutor(1, context, _join, arguments))
        count = self.size if ranks is None else ranks
        calls = [rank.submit(_call, count, function, args) for rank in self._ranks]
        done, _ = wait(calls, return_when=FIRST_EXCEPTION)
        failed = [call for call in done if call.exception()]
        if failed:
            self.close()
            raise failed[0].exception() or AssertionError
        return [call.result() for call in calls[:count]]

    def close(self) -> None:
        for rank in self._ranks:
            for process in list(rank._processes.values()):
                process.kill()
            rank.shutdown(cancel_futures=True)
        self._ranks = []


def _join(rank: int, size: int, backend: str, meeting: str) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, meeting, POOL_TIMEOUT, world_size=size, rank=rank)
    gc.freeze()  # so that `_call` collects only what calls leave behind


_last_group: list[dist.ProcessGroup] = []


def _call(count: int, function: Callable[..., Any], args: tuple) -> Any:
    if _last_group:  # only now have all ranks left it: one that ends it sooner cuts off a peer that still joins
        dist.destroy_process_group(_last_group.pop())
        gc.collect()  # frees the old group: gloo keeps three threads per group, and one wakes 100 times a second
    group = dist.new_group(range(count))
    if not isinstance(group, dist.ProcessGroup):  # this rank is not among them
        return None
    _last_group.append(group)
    return function(group, *args)
