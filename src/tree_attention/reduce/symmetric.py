"""`SymmetricLink`: GPU memory that all ranks of one NVLink domain can write, and the exchange over it in one launch.

Each rank pushes its Partial into every rank's memory as packets that carry their own flag, waits for the others', and
merges them in rank order: no barrier, no fence, no library call (symmetric_kernels.py). Plain peer-to-peer memory from
`torch.distributed._symmetric_memory`; NVLink multicast stays off.
"""

import importlib.util
import os
import socket
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError, TreeAttentionError, Unavailable
from ..group import Group, check_agreement, gather_objects, rank_and_size, resolve_group
from ..partial import Partial

EPOCHS = 1024  # counters, one a program of a launch: more than any GPU has multiprocessors
FEWEST_COLUMNS, PARTS_BYTES = 16, 1 << 25
WARPS, ELEMENTS = 4, 1024


class SymmetricLink:
    """What the exchange keeps between calls; pass it where a group is taken. All ranks of `group` make it together.

    One link serves one stream: calls on it must not overlap. Every rank must make the same calls on it, with the same
    shapes, as often; a CUDA graph may replay them. A call waits on the GPU for the other ranks, and holds
    multiprocessors meanwhile. What else waits there for another rank at the same time (another link on another
    stream, NCCL) needs room beside it, or each may wait for what the other keeps out: give each its share (`programs`).
    CUDA loads a kernel at its first launch and may wait for the device then: with several streams, warm up all kernels
    before, or set CUDA_MODULE_LOADING=EAGER.

    Args:
        group: ranks on one host with peer access, a CUDA device each: a process group, a 1-D mesh, or None for all.
        rows: the most rows `B T H` of one call.
        head_dim: the largest D_v.
        programs: multiprocessors that a call may hold. All by default: nothing else waits for ranks meanwhile.
        timeout_s: how long a kernel waits for another rank. Then it traps, which ends this process's use of CUDA, and
            `check` names the rank. A rank that is late for a good reason must not be later than this.

    Memory: `2 ranks rows (D_v + D_v / 16) 8` bytes for packets, and 34 MB + `rows (D_v + 1) 8` for the parts of a
    decode step; nothing depends on the number of keys.

    Raises:
        InputError: rows, head_dim, programs or timeout_s not positive, a group this rank is not in.
        RanksDisagree: on every rank, if rows, head_dim or programs differ between ranks.
        Unavailable: on every rank, if one of them cannot: no CUDA, no Triton, several hosts, no peer access, or
            NVLink multicast turned on by TORCH_SYMM_MEM_DISABLE_MULTICAST=0.
    """

    def __init__(
        self,
        group: Group = None,
        *,
        rows: int = 4096,
        head_dim: int = 128,
        programs: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        if min(rows, head_dim, 1 if programs is None else programs) < 1 or not timeout_s > 0:
            raise InputError(
                "rows, head_dim, programs and timeout_s must be positive, "
                f"got {rows}, {head_dim}, {programs} and {timeout_s}"
            )
        self.group = resolve_group(group)
        check_agreement({"rows": rows, "head_dim": head_dim, "programs": programs}, self.group)
        self.rank, self.world_size = rank_and_size(self.group)
        self.rows, self.head_dim, self.timeout_s = rows, head_dim, timeout_s
        self.programs = _agree(self.group, programs)
        self.is_alone = programs is None  # no other kernel waits for ranks while one of ours does
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.capacity = rows * (head_dim + -(-head_dim // FEWEST_COLUMNS))  # packets that a rank pushes
        self.buffers = self._rendezvous()
        here: dict[str, Any] = {"device": self.device}
        self.epochs = torch.zeros(EPOCHS, dtype=torch.int32, **here)
        self.parts = torch.zeros(PARTS_BYTES // 8 + rows * (head_dim + 1), dtype=torch.int64, **here)
        self.fault = torch.zeros(self.world_size, dtype=torch.int32).pin_memory()
        torch.cuda.synchronize()
        if self.group is not None:
            dist.barrier(self.group)  # nobody pushes into memory that is not zero yet

    def fits(self, partial: Partial) -> bool:
        """Whether this partial can be handed in."""
        there = partial.out.dtype == torch.float32 and partial.out.device == self.device
        return there and self.holds(partial.lse.numel(), partial.out.shape[3])

    def limit(self, partial: Partial) -> str:
        """What it takes, and what came."""
        return (
            f"needs a float32 partial on {self.device} of at most {self.rows} rows B T H and head dim {self.head_dim}, "
            f"got {partial.lse.numel()}, {partial.out.shape[3]}, {partial.out.dtype} on {partial.out.device}"
        )

    def holds(self, rows: int, head_dim: int) -> bool:
        """Whether there is room for that many rows `B T H` of that D_v."""
        return rows <= self.rows and head_dim <= self.head_dim

    def reduce(self, partial: Partial, *, scatter: bool = False) -> Partial:
        """The merge over ranks in one launch: out `[B, T, H, D_v]` float32, the same bits on every rank.

        scatter: rank r gets heads `r H / P .. (r + 1) H / P - 1` only, and is sent no others.
        """
        self.check()
        if partial.out.numel() == 0:
            return Partial(*_merged(partial.out, self.world_size, scatter))
        out, lse = _exchange(
            partial.out, partial.lse, self.buffers, self.epochs, self.fault, self.capacity, self.rank, self.programs,
            self.is_alone, int(self.timeout_s * 1e9), scatter,
        )  # fmt: skip
        return Partial(out, lse)

    def check(self) -> None:
        """Raise TreeAttentionError naming the ranks that did not arrive in time, if there are any. No device sync."""
        if torch.compiler.is_compiling():
            return
        absent = [rank for rank, flag in enumerate(self.fault.tolist()) if flag]
        if absent:
            raise TreeAttentionError(
                f"ranks {absent} did not arrive within {self.timeout_s:g} s; "
                "CUDA has ended in this process: start it anew"
            )

    def synchronize(self) -> None:
        """Wait for the device; a wait that ended in a trap raises TreeAttentionError, as `check` does."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            self.check()
            raise

    def _rendezvous(self) -> list[Tensor]:
        """Every rank's buffer `[2 slots, ranks, capacity]`, in rank order, zeroed here."""
        count = 2 * self.world_size * self.capacity
        if self.group is None or self.world_size == 1:
            return [torch.zeros(count, dtype=torch.int64, device=self.device)]
        import torch.distributed._symmetric_memory as symmetric_memory

        mine = symmetric_memory.empty(count, dtype=torch.int64, device=self.device)
        self._memory = symmetric_memory.rendezvous(mine, self.group)
        if self._memory.multicast_ptr:
            raise Unavailable("NVLink multicast is on: set TORCH_SYMM_MEM_DISABLE_MULTICAST=1")
        mine.zero_()
        return [self._memory.get_buffer(rank, (count,), torch.int64) for rank in range(self.world_size)]


def _agree(group: ProcessGroup | None, wanted: int | None) -> int:
    """The programs of a launch, the fewest that a rank can hold; or raises on every rank what stands in the way."""
    obstacle = link_obstacle()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    properties = None if device is None else torch.cuda.get_device_properties(device)
    programs = 0 if properties is None else min(properties.multi_processor_count, wanted or 1 << 30)
    mine = (obstacle, socket.gethostname(), device, str(getattr(properties, "uuid", device)), programs)
    ranks = gather_objects(mine, group)
    found = [f"rank {rank} {what}" for rank, (what, *_) in enumerate(ranks) if what]
    hosts, devices = {host for _, host, *_ in ranks}, [device for _, _, device, *_ in ranks]
    uuids = {uuid for *_, uuid, _ in ranks}  # an index may be 0 on every rank, where each sees its own device only
    if not found and len(hosts) > 1:
        found = [f"its ranks are on several hosts: {', '.join(sorted(hosts))}"]
    elif not found and len(uuids) < len(devices):
        found = [f"two ranks share a device: {devices}"]
    elif not found:
        found = _without_peer_access(devices)
    if found:
        raise Unavailable(f"a SymmetricLink is not to be had, {'; '.join(found)}")
    return min(programs for *_, programs in ranks)


def link_obstacle() -> str | None:
    """Why this process cannot take part in a SymmetricLink, whatever the others say; turns NVLink multicast off."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs CUDA"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    multicast = os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if multicast != "1":
        return f"needs NVLink multicast off: TORCH_SYMM_MEM_DISABLE_MULTICAST is {multicast!r}, must be '1'"
    return None


def _without_peer_access(devices: list[Any]) -> list[str]:
    """What stands in the way between devices of one host; every rank sees the same if all see all devices."""
    if max(devices) >= torch.cuda.device_count():
        return []  # this process sees its own device only; the rendezvous will say
    pairs = [(a, b) for a in devices for b in devices if a < b and not torch.cuda.can_device_access_peer(a, b)]
    return [f"no peer access between devices {a} and {b}" for a, b in pairs]


@torch.library.custom_op("tree_attention::exchange", mutates_args=("epochs",))
def _exchange(
    out: Tensor, lse: Tensor, buffers: list[Tensor], epochs: Tensor, fault: Tensor, capacity: int, rank: int,
    programs: int, alone: bool, timeout_ns: int, scatter: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .symmetric_kernels import exchange_kernel

    B, T, H, DV = out.shape
    W, rows = len(buffers), B * T * H
    merged_out, merged_lse = _merged(out, W, scatter)
    UR, UD, ranks = exchange_shape(rows, DV, W, programs)
    units = -(-rows // UR) * -(-DV // UD)
    able = torch.cuda.get_device_capability(out.device)[0] >= 9
    with torch.cuda.device(out.device):
        cast(Any, exchange_kernel)[(min(units, programs),)](
            out.contiguous(), lse.contiguous(), tuple(buffers), buffers[rank], epochs, fault, merged_out, merged_lse,
            rows, H, capacity, rank, timeout_ns, DV=DV, WORLD=W, W_PAD=ranks, UR=UR, UD=UD, SCATTER=scatter,
            PUSH=True, COLLECT=True, PDL=alone and able, num_warps=WARPS, launch_pdl=alone and able,
        )  # fmt: skip
    return merged_out, merged_lse


@_exchange.register_fake
def _(out: Tensor, lse: Tensor, buffers: list[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    return _merged(out, len(buffers), others[-1])


def _merged(out: Tensor, world_size: int, scatter: bool) -> tuple[Tensor, Tensor]:
    B, T, H, DV = out.shape
    shape = (B, T, H // world_size if scatter else H, DV)
    return out.new_empty(shape), out.new_empty(shape[:-1])


def exchange_shape(rows: int, DV: int, world_size: int, programs: int) -> tuple[int, int, int]:
    """(UR, UD, ranks padded): what a program merges at once; every rank must cut alike, for the packets' places."""
    UR, UD = 8, max(1 << (min(DV, 128) - 1).bit_length(), FEWEST_COLUMNS)
    ranks = 1 << (world_size - 1).bit_length()
    while (UR > 1 or UD > FEWEST_COLUMNS) and (UR * UD * ranks > ELEMENTS or -(-rows // UR) * -(-DV // UD) < programs):
        UR, UD = (UR // 2, UD) if UR > 1 else (UR, UD // 2)
    return UR, UD, max(ranks, 32 * WARPS // (UR * UD))
