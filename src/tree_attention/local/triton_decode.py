"""Our split-KV kernel as a backend: a few query rows against many keys, dense or paged, ragged, masked, capped.

Two launches, the parts and their merge, since nothing outlives the call. With a `SymmetricLink`, which keeps what has
to be kept, `fused.py` does both in one, and the exchange over ranks with it.
"""

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..partial import Partial
from .visibility import Selection, keys_of

HAS_TRITON = importlib.util.find_spec("triton") is not None  # a constant: torch.compile traces what asks for it
MAX_QUERY_ROWS = 64  # T H / H_kv
MAX_HEAD_DIM = 256
ROOMY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))  # compute capabilities
MOST_STRIDE = 1 << 24  # between a key and the next: kernels count the numbers of a tile, up to 128 keys, in 32 bits
UNIT_PACKETS = 1024  # that a program waits for at once
PDL_BYTES = 3 << 29  # of keys and values; measured: below, an early start gains 1 to 4 us, above it costs (docs/log.md)


def attend(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, softcap: float | None) -> Partial:
    """`local.attend` after its checks. Reads every key and value once; the workspace does not grow with them."""
    return Partial(*_split_decode(q, k, v, *tensors_of(selection), scale, softcap, selection.window))


def obstacle(q: Tensor, k: Tensor, v: Tensor, selection: Selection, softcap: float | None) -> str | None:
    if not HAS_TRITON:
        return "needs the package triton"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreted()):
        return f"runs on CUDA tensors, got {q.device.type}"
    if torch.version.hip or (q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] < 8):
        return "runs on NVIDIA GPUs of compute capability 8.0 and later"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return "has no gradient, for which q, k or v ask"
    if q.dtype not in ((torch.float16,) if q.device.type == "cpu" else (torch.bfloat16, torch.float16)):
        if q.dtype == torch.bfloat16:
            return "has float16 only on the CPU, where Triton's interpreter runs it, got torch.bfloat16"
        return f"has bfloat16 and float16 only, got {q.dtype}"
    if selection.causal:
        return "knows the causal rule by positions only"
    rows, D, DV = q.shape[1] * (q.shape[2] // k.shape[2]), q.shape[3], v.shape[3]
    if rows > MAX_QUERY_ROWS:
        return f"takes at most {MAX_QUERY_ROWS} query rows a KV head (T H / H_kv), got {rows}"
    if max(D, DV) > MAX_HEAD_DIM or D % 8 or DV % 8:
        return f"needs head dims that are multiples of 8 up to {MAX_HEAD_DIM}, got {D} and {DV}"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program after the other: for tests (float16 only)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Plan:
    """How a step is cut up; from shapes and the number of programs alone, so that ranks agree on it."""

    programs: int  # that are launched: as many as can share the groups evenly, or all
    warps: int
    split: dict[str, Any]  # the constants of `split`
    units: int
    unit: dict[str, int]  # UR, UD, PARTS
    merge: dict[str, int]  # the constants of the merge that `split` has, too
    parts_packets: int


def plan(q: Tensor, k: Tensor, v: Tensor, selection: Selection, programs: int, ranks: int = 1) -> Plan:
    """programs: one a multiprocessor. ranks: whose results a program then merges, too."""
    B, T, H, D = q.shape
    H_kv, DV = k.shape[2], v.shape[3]
    G, groups = H // H_kv, B * H_kv
    M, D_PAD, DV_PAD = T * G, max(_power_of_2(D), 16), max(_power_of_2(DV), 16)
    BM, widest = max(_power_of_2(M), 16), max(D_PAD, DV_PAD)
    BN, stages = _tile(BM, widest, paged=selection.page_table is not None, roomy=_is_roomy(q.device))
    keys = keys_of(k, selection.page_table)
    warps = 4 if groups * _ceil(keys, BN) <= 16 * programs else 8
    parts = min(_power_of_2(max(programs // groups, 2)), 64)
    UR, UD = unit_shape(M, DV, groups, programs, max(parts, _power_of_2(ranks)))
    parts = max(parts, 32 * warps // (UR * UD))
    even = selection.is_everything and k.shape[1] % BN == 0 and k.shape[1] > 0 and (D, DV) == (D_PAD, DV_PAD)
    merge = {"G": G, "BN": BN, "DV": DV, "B_PAD": 0 if selection.local_seqlens is None or B == 1 else _power_of_2(B)}
    split = merge | {"BM": BM, "D": D, "D_PAD": D_PAD, "DV_PAD": DV_PAD, "EVEN": even, "STAGES": stages}
    programs = _launched(groups, programs, alike=selection.local_seqlens is None)
    return Plan(
        programs, warps, split, groups * _ceil(M, UR) * _ceil(DV, UD), {"UR": UR, "UD": UD, "PARTS": parts}, merge,
        (programs + groups) * M * (DV + 1),
    )  # fmt: skip


def _launched(groups: int, programs: int, *, alike: bool) -> int:
    """As many programs as share the groups evenly, if nearly all do; alike: the groups have one length."""
    if groups <= programs:
        even = programs // groups * groups
    else:
        even = groups // _ceil(groups, programs) if alike and groups % _ceil(groups, programs) == 0 else programs
    return even if even * 16 >= programs * 15 else programs


def _tile(BM: int, widest: int, *, paged: bool, roomy: bool) -> tuple[int, int]:
    """(BN, stages): what fills a multiprocessor's shared memory once, measured fastest on Hopper (docs/log.md).

    A page table's entry is loaded before the page it names, so a pipeline is two stages longer.
    """
    if widest <= 128:
        BN, stages = 128 if BM < 64 else 64, 3 if widest == 128 else 5
    else:
        BN, stages = (64, 3) if BM < 64 else (32, 2)
    return (BN if roomy else max(BN // 2, 16)), stages + 2 * paged


def _is_roomy(device: torch.device) -> bool:
    """Whether a program may have 160 KB of shared memory and more (A100, Hopper, B200), not 99 (most other GPUs)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True  # interpreted, or compiled for another machine
    return torch.cuda.get_device_capability(device) in ROOMY


def unit_shape(M: int, DV: int, groups: int, programs: int, deep: int) -> tuple[int, int]:
    """(UR, UD): rows and columns of what a program merges at once, `deep` numbers for each.

    At most UNIT_PACKETS, and small enough that all programs have one. All ranks must cut alike, for the packets'
    places; so from what they share, not from their number of keys.
    """
    UR, UD = _power_of_2(M), min(max(_power_of_2(DV), 16), 128)
    while (UR > 1 or UD > 16) and (UR * UD * deep > UNIT_PACKETS or groups * _ceil(M, UR) * _ceil(DV, UD) < programs):
        UR, UD = (UR // 2, UD) if UR > 1 else (UR, UD // 2)
    return UR, UD


def tensors_of(selection: Selection) -> tuple[Tensor | None, ...]:
    """What the kernels need of it: lengths, page table, positions of queries and keys, mask."""
    return (
        selection.local_seqlens, selection.page_table, selection.q_positions, selection.k_positions, selection.mask
    )  # fmt: skip


def split_arguments(
    q: Tensor, k: Tensor, v: Tensor, chosen: tuple[Tensor | None, ...], scale: float, softcap: float | None,
    window: int | None,
) -> tuple[tuple, tuple, tuple, tuple]:  # fmt: skip
    """(tensors, strides, sizes, factors) of `split`."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    lens, page_table, q_positions, k_positions, mask = chosen
    if lens is not None:
        lens = lens.to(k.device).contiguous()
    if page_table is None:
        k, v = (t.contiguous() if t.stride(1) > MOST_STRIDE else t for t in (k, v))
    else:
        page_table = page_table.contiguous()
    if mask is not None:
        mask = mask.view(torch.uint8)
    strides = (
        q.stride()[:3], k.stride()[:3], v.stride()[:3], 0 if page_table is None else page_table.stride(0),
        _strides(q_positions, 2), _strides(k_positions, 2), _strides(mask, 4),
    )  # fmt: skip
    sizes = (q.shape[0], q.shape[1], k.shape[1], k.shape[2], k.shape[1] if page_table is not None else 1)
    factors = (scale * 1.4426950408889634, softcap, window)
    return (q, k, v, lens, page_table, q_positions, k_positions, mask), strides, sizes, factors


@torch.library.custom_op("tree_attention::split_decode", mutates_args=())
def _split_decode(
    q: Tensor, k: Tensor, v: Tensor, local_seqlens: Tensor | None, page_table: Tensor | None,
    q_positions: Tensor | None, k_positions: Tensor | None, mask: Tensor | None,
    scale: float, softcap: float | None, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton_kernels import merge_kernel, split_kernel

    selection = Selection(local_seqlens, q_positions, k_positions, window, mask, page_table)
    cut = plan(q, k, v, selection, programs_of(q.device))
    tensors, strides, sizes, factors = split_arguments(q, k, v, tensors_of(selection), scale, softcap, window)
    parts = torch.empty(cut.parts_packets, dtype=torch.int64, device=q.device)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with on_device(q.device):
        cast(Any, split_kernel)[(cut.programs,)](
            tensors, strides, sizes, factors, parts, **cut.split, num_warps=cut.warps,
            **pdl(q.device, starts_early(k, v)),
        )  # fmt: skip
        cast(Any, merge_kernel)[(cut.units,)](
            tensors[3], parts, out, lse, sizes, cut.programs, **cut.merge, **cut.unit, num_warps=cut.warps,
            **pdl(q.device, True),
        )  # fmt: skip
    return out, lse


@_split_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[3])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape[:3], dtype=torch.float32)


def programs_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 7


def starts_early(k: Tensor, v: Tensor) -> bool:
    """Whether reading so many keys and values gains by an early start."""
    return k.nbytes + v.nbytes <= PDL_BYTES


def pdl(device: torch.device, wanted: bool) -> dict[str, Any]:
    """Programmatic dependent launch: the kernel is set up while the one before it ends (Hopper and later)."""
    if device.type != "cuda":
        return {"PDL": False}
    able = wanted and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": able, "launch_pdl": able}


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides, 0 for a dim that is there once for all."""
    if tensor is None:
        return (0,) * dims
    return tuple(0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _power_of_2(n: int) -> int:
    """The next power of 2, n included."""
    return 1 << (n - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
