"""Decoding and the merge over ranks in one launch: with its kernel, the only file that knows `local` and `reduce`."""

from typing import Any, cast

import torch
from torch import Tensor

from .local import AttentionCall, KeySelection
from .local.triton_decode import EARLY_START_BYTES, LaunchPlan, early_start, on_device, plan_launch, split_arguments
from .reduce import SymmetricLink


def fused_decode(call: AttentionCall, link: SymmetricLink, sinks: Tensor | None, *, scatter: bool) -> Tensor:
    """Run a resolved `tree_decode`: `[B, T, H, D_v]` in q's dtype, with scatter `[B, T, H / P, D_v]`."""
    q, k, v, selection, scale, softcap = call
    state = link._kernel_state
    workspace, optional = [state.parts, state.fault], [*selection.tensors, sinks]
    how = (scale, softcap, selection.window, scatter)
    return _fused_decode(q, k, v, optional, state.buffers, state.epochs, workspace, state.numbers, *how)


@torch.library.custom_op("tree_attention::fused_decode", mutates_args=("epochs",))
def _fused_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    optional: list[Tensor | None],
    buffers: list[Tensor],
    epochs: Tensor,
    workspace: list[Tensor],
    numbers: list[int],
    scale: float,
    softcap: float | None,
    window: int | None,
    scatter: bool,
) -> Tensor:
    """Launch the kernel. optional: the tensors of a KeySelection, and sinks. workspace: parts and fault of the link."""
    from .fused_kernels import fused_kernel

    *rules, sinks = optional
    parts, fault = workspace
    capacity, rank, programs, is_alone, timeout_ns = numbers
    call = AttentionCall(q, k, v, KeySelection(*rules, window=window), scale, softcap)
    world_size = len(buffers)
    plan = plan_launch(q, k, v, call.selection, programs, world_size)
    out, sinks = _out(q, v, world_size, scatter), None if sinks is None else sinks.contiguous()
    memory = (parts, sinks, tuple(buffers), buffers[rank], epochs, fault, out)
    ranks = {"WORLD": world_size, "W_PAD": ranks_padded(plan, world_size), "SCATTER": scatter}
    options = {"SPLIT": True, "PUSH": True, "COLLECT": True, "num_warps": plan.warps}
    options |= early_start(q.device, bool(is_alone) and k.nbytes + v.nbytes <= EARLY_START_BYTES)
    launch = cast(Any, fused_kernel)[(plan.programs,)]
    constants = plan.split | plan.unit | ranks | options
    with on_device(q.device):
        launch(*split_arguments(call), *memory, capacity, rank, timeout_ns, **constants)
    return out


@_fused_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, optional: Any, buffers: list[Tensor], *others: Any) -> Tensor:
    return _out(q, v, len(buffers), others[-1])


def _out(q: Tensor, v: Tensor, world_size: int, scatter: bool) -> Tensor:
    B, T, H, _ = q.shape
    return q.new_empty((B, T, H // world_size if scatter else H, v.shape[3]))


def ranks_padded(plan: LaunchPlan, world_size: int) -> int:
    """Return a power of 2 of at least `world_size` that also gives every thread a packet to wait for."""
    UR, UD = plan.unit["UR"], plan.unit["UD"]
    return max(1 << (world_size - 1).bit_length(), 32 * plan.warps // (UR * UD))
