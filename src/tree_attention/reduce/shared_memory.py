"""An all-gather through memory that the ranks of one host share: for CPU ranks, where gloo's latency is what costs.

The protocol is the one that fits NVLink too. Each rank pushes its data into a slot that all can read, in packets of 8
bytes, half data and half epoch: a packet is written and read as one, so whoever sees the epoch sees the data, and no
barrier is needed. Two slots in turn suffice: a rank writes epoch e + 2 only after every rank has pushed e + 1, and
so has read e. Waiting is a bounded spin.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import TreeAttentionError, Unavailable
from ..group import check_agreement, gather_objects
from ..partial import Partial

CAPACITY_BYTES = 1 << 20
SPIN_S, NAP_S, TIMEOUT_S = 0.02, 0.0002, 600.0


class SharedMemoryLink:
    """Memory that all ranks of `group` map, made by all of them together; pass it where a group is taken.

    A failed rank leaves nothing behind: the file has no name any more once it is mapped.

    Args:
        group: ranks on one host, CPU tensors.
        capacity_bytes: the largest tensor that a rank can hand in. Memory: 4 x ranks x capacity, taken as it is used.

    Raises:
        RanksDisagree: on every rank, about capacity_bytes.
        Unavailable: on every rank, if the ranks do not see the same memory (several hosts).
    """

    def __init__(self, group: ProcessGroup, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        check_agreement({"capacity_bytes": capacity_bytes}, group)
        self.group, self.capacity_bytes = group, capacity_bytes
        self._epoch = 0
        size = group.size()
        name = [_new_file() if group.rank() == 0 else ""]
        dist.broadcast_object_list(name, group=group, group_src=0)
        seen = gather_objects(Path(name[0]).exists(), group)
        try:
            if not all(seen):
                raise Unavailable(
                    f"shared memory needs all ranks on one host, ranks {_where(seen, False)} are elsewhere"
                )
            words = capacity_bytes // 4
            mapped = torch.from_file(name[0], shared=True, size=2 * size * words, dtype=torch.int64)
            self._slots = mapped.view(2, size, words).numpy()  # NumPy's calls cost a fifth of torch's on few numbers
            self._packets = np.empty((words, 2), dtype=np.int32)
            dist.barrier(group)
        finally:
            if group.rank() == 0:
                os.unlink(name[0])

    def fits(self, partial: Partial) -> bool:
        """Whether this partial can be handed in."""
        nbytes = partial.out.nbytes + partial.lse.nbytes
        return partial.out.device.type == "cpu" and nbytes <= self.capacity_bytes

    def limit(self, partial: Partial) -> str:
        """What it takes, and what came."""
        nbytes = partial.out.nbytes + partial.lse.nbytes
        return (
            f"needs a CPU partial of at most {self.capacity_bytes} bytes (capacity_bytes), "
            f"got {nbytes} on {partial.out.device}"
        )

    def gather(self, tensor: Tensor) -> Tensor:
        """`[...]` on each rank, of at most `capacity_bytes` -> `[P, ...]` on every rank, in rank order."""
        self._epoch = self._epoch % 0x7FFFFFFE + 1  # never 0, what fresh memory holds; even before it wraps to odd
        words = tensor.detach().contiguous().view(-1).view(torch.int32).numpy()
        slot = self._slots[self._epoch % 2, :, : len(words)]
        packets = self._packets[: len(words)]
        packets[:, 0], packets[:, 1] = words, self._epoch
        slot[self.group.rank()] = packets.view(np.int64)[:, 0]
        received = np.ascontiguousarray(self._wait(slot)[:, 0::2])
        return torch.from_numpy(received).view(tensor.dtype).view(self.group.size(), *tensor.shape)

    def _wait(self, slot: np.ndarray) -> np.ndarray:
        """A copy of `slot` `[P, n]` as int32 `[P, 2 n]`, in which every packet is of this epoch."""
        start = time.monotonic()
        while True:
            copy = slot.copy().view(np.int32)
            arrived = copy[:, 1::2] == self._epoch
            if arrived.all():
                return copy
            waited_s = time.monotonic() - start
            if waited_s > TIMEOUT_S:
                missing = _where(arrived.all(1).tolist(), False)
                raise TreeAttentionError(f"ranks {missing} did not arrive within {TIMEOUT_S:.0f} s")
            if waited_s > SPIN_S:
                time.sleep(NAP_S)
            else:
                os.sched_yield()


def _new_file() -> str:
    memory = Path("/dev/shm")
    descriptor, name = tempfile.mkstemp(prefix="tree-attention-", dir=memory if memory.is_dir() else None)
    os.close(descriptor)
    return name


def _where(flags: list[bool], value: bool) -> list[int]:
    return [rank for rank, flag in enumerate(flags) if flag is value]
