"""`SharedMemoryLink`: an all-gather through memory that CPU ranks of one host share, since gloo's latency is high.

Each rank writes packets of 8 bytes, half data and half epoch, which need no barrier (packets.py). Two alternating slots
suffice: a rank writes epoch e + 2 only after every rank has written e + 1, and so has read e.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import TreeAttentionError, Unavailable
from ..group import broadcast_from_first, check_agreement, gather_values
from ..host import usable_cpus
from ..partial import Partial, PartialSpec, merge
from .collectives import pack, unpack
from .link import NodeLink

CAPACITY_BYTES = 1 << 20
SPIN_S, NAP_S, TIMEOUT_S = 0.002, 0.0001, 600.0
WATCH_S = 0.2  # from the start of a wait until it first asks `watch`, and between two such questions


class SharedMemoryLink(NodeLink):
    """Memory that all ranks of `group` map. Pass it in place of the group. All ranks construct it together.

    A crashed rank leaves no file behind: the file is unlinked as soon as every rank has mapped it.

    Args:
        group: ranks on one host, with CPU tensors.
        capacity_bytes: size of the largest partial. Memory: 4 x ranks x capacity, reserved here.

    Attributes:
        watch: called every 0.2 s while this rank waits. A wait that is in vain raises the error that it returns.

    Raises:
        RanksDisagree: on every rank, if capacity_bytes differs between ranks.
        Unavailable: on every rank, if the ranks do not share memory (several hosts), or there is no room for it.
    """

    algorithms = ("shared_memory",)

    def __init__(self, group: ProcessGroup, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        check_agreement({"capacity_bytes": capacity_bytes}, group)
        self.group, self.capacity_bytes = group, capacity_bytes
        self.rank, self.world_size = group.rank(), group.size()
        self.epoch = 0
        self.watch: Callable[[], Exception | None] = lambda: None
        # A rank that spins keeps the one that it waits for from running, if ranks outnumber cores.
        self._spin_s = SPIN_S if self.world_size <= usable_cpus() else 0.0
        words = capacity_bytes // 4
        name = broadcast_from_first(_reserve(2 * self.world_size * words * 8) if self.rank == 0 else None, group)
        if name is None:
            raise Unavailable("no folder for shared memory can be written to, or has room: see /dev/shm")
        seen = gather_values(Path(name).exists(), group)
        try:
            if not all(seen):
                elsewhere = [rank for rank, is_seen in enumerate(seen) if not is_seen]
                raise Unavailable(f"shared memory needs all ranks on one host, ranks {elsewhere} are elsewhere")
            mapped = torch.from_file(name, shared=True, size=2 * self.world_size * words, dtype=torch.int64)
            # on few numbers NumPy takes a fifth of torch's time
            self._slots = mapped.view(2, self.world_size, words).numpy()
            self._packets = np.empty((words, 2), dtype=np.int32)
            dist.barrier(group)
        finally:
            if self.rank == 0:
                os.unlink(name)

    def obstacle(self, spec: PartialSpec) -> str | None:
        if spec.device.type == "cpu" and spec.nbytes() <= self.capacity_bytes:
            return None
        most = f"{self.capacity_bytes} bytes (capacity_bytes)"
        return f"needs a CPU partial of at most {most}, got {spec.nbytes()} on {spec.device}"

    def reduce(self, partial: Partial, *, scatter: bool = False) -> Partial:
        return merge(unpack(self.gather(pack(partial))))

    def merge_slices(self, pieces: Tensor, place: int) -> Tensor:
        return pack(merge(unpack(self.gather(pieces)[:, min(place, len(pieces) - 1)])))

    def gather_slices(self, mine: Tensor, place: int, slices: int) -> Tensor:
        return self.gather(mine)[:slices]

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather `[...]` of each rank, at most `capacity_bytes`, to `[P, ...]` on every rank, in rank order."""
        self.epoch = self.epoch % 0x7FFFFFFE + 1  # never 0 (fresh memory); an even maximum keeps slots alternating
        words = tensor.detach().contiguous().view(-1).view(torch.int32).numpy()
        slot = self._slots[self.epoch % 2, :, : len(words)]
        packets = self._packets[: len(words)]
        packets[:, 0], packets[:, 1] = words, self.epoch
        slot[self.rank] = packets.view(np.int64)[:, 0]
        received = np.ascontiguousarray(self._wait(slot)[:, 0::2])
        return torch.from_numpy(received).view(tensor.dtype).view(self.world_size, *tensor.shape)

    def _wait(self, slot: np.ndarray) -> np.ndarray:
        """Wait until every packet of `slot` `[P, n]` carries this epoch; return a copy as int32 `[P, 2 n]`."""
        start, looks, trouble = time.monotonic(), 0, None
        while True:
            copy = slot.copy().view(np.int32)
            arrived = copy[:, 1::2] == self.epoch
            if arrived.all():
                return copy
            if trouble is not None:  # and the packets are still missing
                raise trouble
            waited_s = time.monotonic() - start
            if waited_s > TIMEOUT_S:
                missing = np.flatnonzero(~arrived.all(1)).tolist()
                raise TreeAttentionError(f"ranks {missing} did not arrive within {TIMEOUT_S:.0f} s")
            if waited_s > WATCH_S * (looks + 1):
                looks, trouble = looks + 1, self.watch()
            elif waited_s > self._spin_s:
                time.sleep(NAP_S)
            else:
                os.sched_yield()


def _reserve(size: int) -> str | None:
    """Create a file with `size` bytes reserved, and return its name; None if there is no room."""
    for folder in ("/dev/shm", None):  # None: the folder for temporary files
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix="tree-attention-", dir=folder)
            try:
                os.posix_fallocate(descriptor, 0, size)  # else a write beyond the free memory kills the rank by SIGBUS
                return name
            except OSError:
                os.unlink(name)
            finally:
                os.close(descriptor)
    return None
