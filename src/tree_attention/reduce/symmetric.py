"""`SymmetricLink`: GPU memory that all ranks of one NVLink domain can write, and the exchange over it in one launch.

Each rank pushes its Partial into every rank's memory as packets that carry their own flag, waits for the others', and
merges them in rank order, without barrier, fence or library call (symmetric_kernels.py). The memory is plain
peer-to-peer memory from `torch.distributed._symmetric_memory`; NVLink multicast stays off.
"""

import importlib.util
import os
import socket
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError, TreeAttentionError, Unavailable
from ..group import Group, check_agreement, gather_values, rank_and_size, resolve_group
from ..partial import Partial, PartialSpec
from .link import NodeLink

MIN_COLUMNS, MAX_ROWS = 16, 8  # of a unit, what one program merges at once
PARTS_BYTES = 1 << 25
WARPS = 4
LATE, STOPPED = 1, 2
MULTICAST_OFF = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class KernelState(NamedTuple):
    """What the kernels of a link need, as the arguments of a torch custom op."""

    buffers: list[Tensor]  # every rank's, int64 `[2 slots, ranks, capacity]` flat, in rank order
    epochs: Tensor  # int32, one counter per program
    parts: Tensor  # int64, workspace of a decode step
    fault: Tensor  # int32 `[ranks]`, pinned: LATE for a rank that did not arrive, STOPPED to stop the kernels' waiting
    numbers: list[int]  # capacity, rank, programs, is_alone, timeout_ns


class SymmetricLink(NodeLink):
    """Memory that all ranks of `group` can write over NVLink. Pass it in place of the group.

    All ranks construct it together and make the same calls on it, in the same order and with the same shapes, on one
    stream; a CUDA graph may replay them. A call waits on the GPU for the other ranks and occupies multiprocessors
    meanwhile. Concurrent kernels that wait for ranks (another link on another stream, NCCL) can starve each other:
    split the multiprocessors with `programs`. CUDA loads a kernel at its first launch and may wait for the device then:
    with several streams, warm up all kernels first, or set CUDA_MODULE_LOADING=EAGER.

    Memory: `2 ranks rows (D_v + D_v / 16) 8` bytes for packets, and 34 MB + `rows (D_v + 1) 8` for the parts of a
    decode step.

    Args:
        group: ranks on one host with peer access, one CUDA device each: a process group, a 1-D mesh, or None for all.
        rows: maximum number of rows `B T H` of one call.
        head_dim: maximum D_v.
        programs: number of multiprocessors that a call may occupy. Default: all, which requires that no other kernel
            waits for ranks at the same time.
        timeout_s: how long a kernel waits for another rank; longer than any legitimate delay. Then it traps, which ends
            this process's use of CUDA, and `check` names the rank.

    Raises:
        InputError: rows, head_dim, programs or timeout_s is not positive, or this rank is not in the group.
        RanksDisagree: on every rank, if rows, head_dim or programs differ between ranks.
        Unavailable: on every rank, if one of them lacks a requirement: CUDA, Triton, one host, peer access, or NVLink
            multicast turned off (TORCH_SYMM_MEM_DISABLE_MULTICAST is neither unset nor 1).
    """

    algorithms = ("symmetric", "symmetric_scatter")

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
            got = f"{rows}, {head_dim}, {programs} and {timeout_s}"
            raise InputError(f"rows, head_dim, programs and timeout_s must be positive, got {got}")
        self.group = resolve_group(group)
        check_agreement({"rows": rows, "head_dim": head_dim, "programs": programs}, self.group)
        self.rank, self.world_size = rank_and_size(self.group)
        self.rows, self.head_dim, self.timeout_s = rows, head_dim, timeout_s
        self.programs = _agree_on_programs(self.group, programs)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._kernel_state = self._allocate(is_alone=programs is None)
        torch.cuda.synchronize()
        if self.group is not None:
            dist.barrier(self.group)  # all buffers are zero before a rank pushes

    @property
    def workspace_bytes(self) -> int:
        """Device memory of this link on this rank."""
        state = self._kernel_state
        return sum(tensor.nbytes for tensor in (state.buffers[self.rank], state.epochs, state.parts))

    def obstacle(self, spec: PartialSpec) -> str | None:
        if spec.dtype != torch.float32 or spec.device != self.device:
            return f"needs a float32 partial on {self.device}, got {spec.dtype} on {spec.device}"
        if spec.rows() > self.rows or spec.shape[3] > self.head_dim:
            most = f"{self.rows} rows B T H and head dim {self.head_dim}"
            return f"has a link for at most {most}, got {spec.rows()} and {spec.shape[3]}"
        return None

    def reduce(self, partial: Partial, *, scatter: bool = False) -> Partial:
        self.check()
        if partial.out.numel() == 0:
            return Partial(*_merged(partial.out, self.world_size, scatter))
        state = self._kernel_state
        return Partial(*_exchange(*partial, state.buffers, state.epochs, state.fault, state.numbers, scatter))

    def check(self) -> None:
        """Raise TreeAttentionError naming the ranks that did not arrive in time. No device synchronization."""
        if torch.compiler.is_compiling():
            return
        faults = self._kernel_state.fault.tolist()
        if STOPPED in faults:
            raise TreeAttentionError("this SymmetricLink was stopped, because a rank failed: create a new one")
        absent = [rank for rank, fault in enumerate(faults) if fault == LATE]
        if absent:
            after = f"{self.timeout_s:g} s; CUDA has ended in this process: start it anew"
            raise TreeAttentionError(f"ranks {absent} did not arrive within {after}")

    def stop_waiting(self) -> None:
        """Let kernels that wait for other ranks end at once, with undefined numbers. Every later call raises.

        Any thread may call this, once it knows that a rank failed. CUDA goes on in this process.
        """
        self._kernel_state.fault.fill_(STOPPED)

    def synchronize(self) -> None:
        """Wait for the device; a wait that ended in a trap raises TreeAttentionError, as `check` does."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            self.check()
            raise

    def _allocate(self, *, is_alone: bool) -> KernelState:
        from .symmetric_kernels import EPOCHS

        capacity = self.rows * (self.head_dim + -(-self.head_dim // MIN_COLUMNS))  # packets that a rank pushes
        numbers = [capacity, self.rank, self.programs, int(is_alone), int(self.timeout_s * 1e9)]
        buffers = self._rendezvous(2 * self.world_size * capacity)
        epochs = torch.zeros(EPOCHS.value, dtype=torch.int32, device=self.device)
        parts_packets = PARTS_BYTES // 8 + self.rows * (self.head_dim + 1)
        parts = torch.zeros(parts_packets, dtype=torch.int64, device=self.device)
        fault = torch.zeros(self.world_size, dtype=torch.int32).pin_memory()
        return KernelState(buffers, epochs, parts, fault, numbers)

    def _rendezvous(self, count: int) -> list[Tensor]:
        """Return every rank's buffer of `count` packets, in rank order; this rank's is zeroed."""
        if self.group is None or self.world_size == 1:
            return [torch.zeros(count, dtype=torch.int64, device=self.device)]
        os.environ.setdefault(MULTICAST_OFF, "1")
        import torch.distributed._symmetric_memory as symmetric_memory

        mine = symmetric_memory.empty(count, dtype=torch.int64, device=self.device)
        self._memory = symmetric_memory.rendezvous(mine, self.group)
        if self._memory.multicast_ptr:
            raise Unavailable(f"NVLink multicast is on: set {MULTICAST_OFF}=1")
        mine.zero_()
        return [self._memory.get_buffer(rank, (count,), torch.int64) for rank in range(self.world_size)]


def _agree_on_programs(group: ProcessGroup | None, requested: int | None) -> int:
    """Return the number of programs of a launch, the minimum over ranks; raise on every rank if one has an obstacle."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    properties = None if device is None else torch.cuda.get_device_properties(device)
    programs = 0 if properties is None else min(properties.multi_processor_count, requested or 1 << 30)
    mine = (link_obstacle(), socket.gethostname(), device, str(getattr(properties, "uuid", device)), programs)
    ranks = gather_values(mine, group)
    found = [f"rank {rank} {obstacle}" for rank, (obstacle, *_) in enumerate(ranks) if obstacle]
    hosts = {host for _, host, *_ in ranks}
    devices: list[Any] = [device for _, _, device, *_ in ranks]
    uuids = {uuid for *_, uuid, _ in ranks}  # where each rank sees only its own device, every index is 0
    if not found and len(hosts) > 1:
        found = [f"its ranks are on several hosts: {', '.join(sorted(hosts))}"]
    elif not found and len(uuids) < len(devices):
        found = [f"two ranks share a device: {devices}"]
    elif not found and max(devices) < torch.cuda.device_count():  # else only the rendezvous sees the other devices
        pairs = [(a, b) for a in devices for b in devices if a < b and not torch.cuda.can_device_access_peer(a, b)]
        found = [f"no peer access between devices {a} and {b}" for a, b in pairs]
    if found:
        raise Unavailable(f"a SymmetricLink is unavailable: {'; '.join(found)}")
    return min(programs for *_, programs in ranks)


def link_obstacle() -> str | None:
    """Return why this process cannot take part in any SymmetricLink; None if it can. Changes nothing."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs CUDA"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    multicast = os.environ.get(MULTICAST_OFF, "1")  # if unset, SymmetricLink sets it
    if multicast != "1":
        return f"needs NVLink multicast off: {MULTICAST_OFF} is {multicast!r}, must be '1'"
    return None


@torch.library.custom_op("tree_attention::exchange", mutates_args=("epochs",))
def _exchange(
    out: Tensor, lse: Tensor, buffers: list[Tensor], epochs: Tensor, fault: Tensor, numbers: list[int], scatter: bool
) -> tuple[Tensor, Tensor]:
    """Launch `exchange_kernel`; arguments as in `KernelState`."""
    from .symmetric_kernels import exchange_kernel

    capacity, rank, programs, is_alone, timeout_ns = numbers
    B, T, H, DV = out.shape
    world_size, rows = len(buffers), B * T * H
    merged_out, merged_lse = _merged(out, world_size, scatter)
    UR, UD, ranks = exchange_unit(rows, DV, world_size, programs)
    units = -(-rows // UR) * -(-DV // UD)
    early = bool(is_alone) and torch.cuda.get_device_capability(out.device)[0] >= 9
    tensors = (out.contiguous(), lse.contiguous(), tuple(buffers), buffers[rank], epochs, fault, merged_out, merged_lse)
    unit = {"DV": DV, "WORLD": world_size, "W_PAD": ranks, "UR": UR, "UD": UD, "SCATTER": scatter}
    options = {"PUSH": True, "COLLECT": True, "PDL": early, "launch_pdl": early, "num_warps": WARPS}
    launch = cast(Any, exchange_kernel)[(min(units, programs),)]
    with torch.cuda.device(out.device):
        launch(*tensors, rows, H, capacity, rank, timeout_ns, **unit, **options)
    return merged_out, merged_lse


@_exchange.register_fake
def _(out: Tensor, lse: Tensor, buffers: list[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    return _merged(out, len(buffers), others[-1])


def _merged(out: Tensor, world_size: int, scatter: bool) -> tuple[Tensor, Tensor]:
    B, T, H, DV = out.shape
    shape = (B, T, H // world_size if scatter else H, DV)
    return out.new_empty(shape), out.new_empty(shape[:-1])


def exchange_unit(rows: int, DV: int, world_size: int, programs: int) -> tuple[int, int, int]:
    """Return (UR, UD, ranks padded): the unit that a program merges at once. It decides where packets lie."""
    from ..packets import unit_shape

    ranks = 1 << (world_size - 1).bit_length()
    UR, UD = unit_shape(MAX_ROWS, rows, DV, groups=1, programs=programs, depth=ranks)
    return UR, UD, max(ranks, 32 * WARPS // (UR * UD))
