"""Decoding and the merge over ranks in one launch; the one file, with its kernel, that knows `local` and `reduce`."""

from typing import Any, cast

import torch
from torch import Tensor

from .local import triton_decode
from .local.triton_decode import Plan, on_device, pdl, plan, split_arguments, starts_early, tensors_of
from .local.visibility import Selection
from .reduce import SymmetricLink


def fused_decode(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, link: SymmetricLink, *, scale: float,
    softcap: float | None, sinks: Tensor | None, scatter: bool,
) -> Tensor:  # fmt: skip
    """`tree_decode` after its checks, whole: `[B, T, H, D_v]` in q's dtype, with scatter `[B, T, H / P, D_v]`."""
    return _fused_decode(
        q, k, v, *tensors_of(selection), sinks, link.buffers, link.epochs, link.parts, link.fault, link.capacity,
        link.rank, link.programs, link.is_alone, int(link.timeout_s * 1e9), scale, softcap, selection.window, scatter,
    )  # fmt: skip


def obstacle(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, softcap: float | None, link: SymmetricLink
) -> str | None:
    """Why this step cannot be fused, from values that all ranks share; None if it can."""
    found = triton_decode.obstacle(q, k, v, selection, softcap)
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    if found is None and not link.holds(rows, v.shape[3]):
        return (
            f"has a link for at most {link.rows} rows B T H and head dim {link.head_dim}, got {rows} and {v.shape[3]}"
        )
    return found


@torch.library.custom_op("tree_attention::fused_decode", mutates_args=("epochs",))
def _fused_decode(
    q: Tensor, k: Tensor, v: Tensor, local_seqlens: Tensor | None, page_table: Tensor | None,
    q_positions: Tensor | None, k_positions: Tensor | None, mask: Tensor | None, sinks: Tensor | None,
    buffers: list[Tensor], epochs: Tensor, parts: Tensor, fault: Tensor, capacity: int,
    rank: int, programs: int, alone: bool, timeout_ns: int, scale: float, softcap: float | None, window: int | None,
    scatter: bool,
) -> Tensor:  # fmt: skip
    from .fused_kernels import fused_kernel

    W, kernel = len(buffers), cast(Any, fused_kernel)
    selection = Selection(local_seqlens, q_positions, k_positions, window, mask, page_table)
    cut = plan(q, k, v, selection, programs, W)
    tensors, strides, sizes, factors = split_arguments(q, k, v, tensors_of(selection), scale, softcap, window)
    out, sinks = _out(q, v, W, scatter), None if sinks is None else sinks.contiguous()
    with on_device(q.device):
        kernel[(cut.programs,)](
            tensors, strides, sizes, factors, parts, sinks, tuple(buffers), buffers[rank], epochs, fault, out,
            capacity, rank, timeout_ns, **cut.split, **cut.unit, WORLD=W, W_PAD=ranks_padded(cut, W), SCATTER=scatter,
            SPLIT=True, PUSH=True, COLLECT=True, num_warps=cut.warps, **pdl(q.device, alone and starts_early(k, v)),
        )  # fmt: skip
    return out


@_fused_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return _out(q, v, len(others[6]), others[-1])


def _out(q: Tensor, v: Tensor, world_size: int, scatter: bool) -> Tensor:
    B, T, H, _ = q.shape
    return q.new_empty((B, T, H // world_size if scatter else H, v.shape[3]))


def ranks_padded(cut: Plan, world_size: int) -> int:
    """A power of 2, and enough that every thread has a packet to wait for."""
    UR, UD = cut.unit["UR"], cut.unit["UD"]
    return max(1 << (world_size - 1).bit_length(), 32 * cut.warps // (UR * UD))
