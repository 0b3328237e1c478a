"""The backend "triton": a split-KV kernel for few query rows and many keys, dense or paged, ragged, masked, capped.

Two launches, the parts and their merge. With the state that a `SymmetricLink` keeps, `fused.py` needs one launch.
"""

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..partial import Partial
from .selection import AttentionCall, KeySelection, key_count

HAS_TRITON = importlib.util.find_spec("triton") is not None  # a constant, since torch.compile traces `obstacle`
MAX_QUERY_ROWS = 64  # T H / H_kv
MAX_HEAD_DIM = 256
LARGE_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))  # capabilities with 160 KB or more; most have 99
MAX_STRIDE = 1 << 24  # between neighbouring keys: kernels count the numbers of a tile, up to 128 keys, in 32 bits
EARLY_START_BYTES = 3 << 29  # of keys and values; measured: below, an early start gains 1 to 4 us (docs/log.md)
LOG2_E = 1.4426950408889634


def attend(call: AttentionCall) -> Partial:
    """`local.attend` after its checks. Reads every key and value once; the workspace does not grow with them."""
    q, k, v, selection, scale, softcap = call
    return Partial(*_split_decode(q, k, v, selection.tensors, scale, softcap, selection.window))


def obstacle(call: AttentionCall) -> str | None:
    """Return why the kernel cannot run this call; None if it can."""
    q, k, v, selection, _, _ = call
    if not HAS_TRITON:
        return "needs the package triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, one program after the other: for tests
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreted):
        return f"runs on CUDA tensors, got {q.device.type}"
    if torch.version.hip or (q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] < 8):
        return "runs on NVIDIA GPUs of compute capability 8.0 and later"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return "has no gradient, but q, k or v requires one"
    if q.dtype not in ((torch.float16,) if q.device.type == "cpu" else (torch.bfloat16, torch.float16)):
        if q.dtype == torch.bfloat16:
            return "has float16 only on the CPU, where Triton's interpreter runs it, got torch.bfloat16"
        return f"has bfloat16 and float16 only, got {q.dtype}"
    if selection.causal:
        return "supports the causal rule by positions only"
    rows, D, DV = q.shape[1] * (q.shape[2] // k.shape[2]), q.shape[3], v.shape[3]
    if rows > MAX_QUERY_ROWS:
        return f"takes at most {MAX_QUERY_ROWS} query rows per KV head (T H / H_kv), got {rows}"
    if max(D, DV) > MAX_HEAD_DIM or D % 8 or DV % 8:
        return f"needs head dims that are multiples of 8 up to {MAX_HEAD_DIM}, got {D} and {DV}"
    return None


@dataclass(frozen=True)
class LaunchPlan:
    """Sizes of a launch, from shapes and the number of programs alone, so that all ranks compute the same."""

    programs: int  # to launch
    warps: int  # per program
    split: dict[str, Any]  # constants of the kernel
    merge: dict[str, int]  # constants of the kernel
    unit: dict[str, int]  # UR rows, UD columns and PARTS parts, merged at once
    units: int
    parts_packets: int  # of the workspace


def plan_launch(
    q: Tensor, k: Tensor, v: Tensor, selection: KeySelection, programs: int, world_size: int = 1
) -> LaunchPlan:
    """Plan a launch on `programs` multiprocessors, whose programs also merge the results of `world_size` ranks."""
    from ..packets import unit_shape

    B, T, H, D = q.shape
    H_kv, DV = k.shape[2], v.shape[3]
    G, groups = H // H_kv, B * H_kv
    M, D_PAD, DV_PAD = T * G, max(_power_of_2(D), 16), max(_power_of_2(DV), 16)
    BM, widest = max(_power_of_2(M), 16), max(D_PAD, DV_PAD)
    has_gpu = q.device.type == "cuda" and torch.cuda.is_available()  # else interpreted, or compiled for another machine
    large = not has_gpu or torch.cuda.get_device_capability(q.device) in LARGE_SHARED_MEMORY
    BN, stages = _tile(BM, widest, paged=selection.page_table is not None, large=large)
    keys = key_count(k, selection.page_table)
    warps = 4 if groups * _ceil(keys, BN) <= 16 * programs else 8
    parts = min(_power_of_2(max(programs // groups, 2)), 64)
    depth = max(parts, _power_of_2(world_size))
    UR, UD = unit_shape(_power_of_2(M), M, DV, groups=groups, programs=programs, depth=depth)
    parts = max(parts, 32 * warps // (UR * UD))
    even = not selection.has_rules and k.shape[1] % BN == 0 and k.shape[1] > 0 and (D, DV) == (D_PAD, DV_PAD)
    merge = {"G": G, "BN": BN, "DV": DV, "B_PAD": 0 if selection.local_seqlens is None or B == 1 else _power_of_2(B)}
    split = merge | {"BM": BM, "D": D, "D_PAD": D_PAD, "DV_PAD": DV_PAD, "EVEN": even, "STAGES": stages}
    unit, units = {"UR": UR, "UD": UD, "PARTS": parts}, groups * _ceil(M, UR) * _ceil(DV, UD)
    launched = _launched(groups, programs, equal_lengths=selection.local_seqlens is None)
    return LaunchPlan(launched, warps, split, merge, unit, units, (launched + groups) * M * (DV + 1))


def _launched(groups: int, programs: int, *, equal_lengths: bool) -> int:
    """Return the most programs that share the groups evenly, if those are nearly all; otherwise all."""
    even, each = programs // groups * groups, _ceil(groups, programs)
    if groups > programs:
        even = groups // each if equal_lengths and groups % each == 0 else programs
    return even if even * 16 >= programs * 15 else programs


def _tile(BM: int, widest: int, *, paged: bool, large: bool) -> tuple[int, int]:
    """Return (BN, stages) that fill a multiprocessor's shared memory; measured fastest on Hopper (docs/log.md)."""
    if widest <= 128:
        BN, stages = 128 if BM < 64 else 64, 3 if widest == 128 else 5
    else:
        BN, stages = (64, 3) if BM < 64 else (32, 2)
    return (BN if large else max(BN // 2, 16)), stages + 2 * paged  # the entry of a page is loaded before the page


def split_arguments(call: AttentionCall) -> tuple[tuple, tuple, tuple, tuple]:
    """Return the arguments (tensors, strides, sizes, factors) of the kernel `split`."""
    selection, page_table, lens, mask = call.selection, call.selection.page_table, call.selection.local_seqlens, None
    by_query = None  # lens, if each query has its own
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.q, call.k, call.v))
    if lens is not None:
        lens = lens.to(k.device).contiguous()
        by_query = lens if lens.ndim == 2 and lens.shape[1] > 1 else None
    table_stride = 0
    if page_table is None:
        k, v = (t.contiguous() if t.stride(1) > MAX_STRIDE else t for t in (k, v))
    else:
        page_table = page_table.contiguous()
        table_stride = page_table.stride(0)
    if selection.mask is not None:
        mask = selection.mask.view(torch.uint8)
    positions = (selection.q_positions, selection.k_positions)
    by_rule = (table_stride, *(_strides(rows, 2) for rows in positions), _strides(mask, 4))
    strides = (q.stride()[:3], k.stride()[:3], v.stride()[:3], *by_rule)
    lens_stride = 1 if by_query is None else q.shape[1]
    sizes = (q.shape[0], q.shape[1], k.shape[1], k.shape[2], k.shape[1] if page_table is not None else 1, lens_stride)
    factors = (call.scale * LOG2_E, call.softcap, selection.window)
    return (q, k, v, lens, page_table, *positions, mask, by_query), strides, sizes, factors


@torch.library.custom_op("tree_attention::split_decode", mutates_args=())
def _split_decode(
    q: Tensor, k: Tensor, v: Tensor, rules: list[Tensor | None], scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Launch both kernels. rules: the tensors of a KeySelection."""
    from .triton_kernels import merge_kernel, split_kernel

    call = AttentionCall(q, k, v, KeySelection(*rules, window=window), scale, softcap)
    plan = plan_launch(q, k, v, call.selection, multiprocessors(q.device))
    tensors, strides, sizes, factors = split_arguments(call)
    parts = torch.empty(plan.parts_packets, dtype=torch.int64, device=q.device)
    out, lse = _result(q, v)
    split, merge = cast(Any, split_kernel)[(plan.programs,)], cast(Any, merge_kernel)[(plan.units,)]
    lens, merged = tensors[3], plan.merge | plan.unit
    early = early_start(q.device, k.nbytes + v.nbytes <= EARLY_START_BYTES)
    with on_device(q.device):
        split(tensors, strides, sizes, factors, parts, **plan.split, num_warps=plan.warps, **early)
        early = early_start(q.device, True)
        merge(lens, parts, out, lse, sizes, plan.programs, **merged, num_warps=plan.warps, **early)
    return out, lse


@_split_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _result(q, v)


def _result(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[3])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape[:3], dtype=torch.float32)


def multiprocessors(device: torch.device) -> int:
    """Return the number of programs that run at the same time; an odd number where they are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 7


def early_start(device: torch.device, wanted: bool) -> dict[str, Any]:
    """Return the options of programmatic dependent launch: start while the kernel before still runs (Hopper and up)."""
    if device.type != "cuda":
        return {"PDL": False}
    able = wanted and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": able, "launch_pdl": able}


def on_device(device: torch.device) -> Any:
    """Return a context in which Triton launches on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Return the strides, 0 for dims of size 1."""
    if tensor is None:
        return (0,) * dims
    return tuple(0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
