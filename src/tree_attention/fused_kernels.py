"""Decoding and the merge over ranks in one kernel: split, merge this GPU's parts, push, wait, merge the ranks', round.

No program waits before it has published all of its own work, and there are no more programs than multiprocessors, so no
program waits for one that cannot start. `SymmetricLink` says what else may occupy multiprocessors.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .local.triton_kernels import contributors, divide, merge_parts, out_row, prefetch, split, unit_at
from .reduce.symmetric_kernels import collect, keep_epoch, next_epoch, out_place, own, push


@triton.jit
def fused_kernel(
    tensors, strides, sizes, factors, parts, sinks, buffers, mine, epochs, fault, out, capacity, rank, timeout_ns,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, B_PAD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    UR: tl.constexpr, UD: tl.constexpr, PARTS: tl.constexpr, WORLD: tl.constexpr, W_PAD: tl.constexpr,
    SCATTER: tl.constexpr, SPLIT: tl.constexpr, PUSH: tl.constexpr, COLLECT: tl.constexpr, PDL: tl.constexpr,
):
    """`tensors` to `parts` as in `split`; buffers to timeout_ns as in `exchange_kernel`; sinks `[H]` or None.

    out: `[B, T, H, DV]`, with SCATTER `[B, T, H / WORLD, DV]`, in the dtype of its pointer. SPLIT, PUSH, COLLECT: which
    steps to run; all, except in tests, where programs run one after the other and cannot wait for each other.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    B, T, _, H_kv, _, _ = sizes
    M, H = T * G, H_kv * G
    rows = B * T * H
    per_row: tl.constexpr = (DV + UD - 1) // UD
    units = B * H_kv * tl.cdiv(M, UR) * per_row
    if PDL:
        prefetch(tensors, strides, sizes, BN, D, DV, B_PAD)
        gdc_wait()
    epoch = next_epoch(epochs, program)
    work = divide(tensors[3], sizes, programs, BN, B_PAD)
    if SPLIT:
        split(
            tensors, strides, sizes, factors, work, parts, epoch,
            G, BM, BN, D, DV, D_PAD, DV_PAD, B_PAD, EVEN, STAGES,
        )
    if PDL:
        gdc_launch_dependents()
    if PUSH:
        for unit in range(program, units, programs):
            group, m, cols = unit_at(unit, M, UR, UD, DV)
            first, last = contributors(group, work, B, H_kv, B_PAD)
            numbers, lse = merge_parts(
                parts, epoch, sizes, programs, first, last, group, m, cols, fault + rank, timeout_ns, G, DV, PARTS
            )
            row = out_row(group, m, B, T, H_kv, G)
            push(buffers, numbers, lse, row, cols, m < M, rows, H, capacity, rank, epoch, DV, WORLD, UD, SCATTER)
    if COLLECT:
        for unit in range(program, units, programs):
            group, m, cols = unit_at(unit, M, UR, UD, DV)
            row = out_row(group, m, B, T, H_kv, G)
            live = (m < M) & own(row, rows, H, rank, WORLD, SCATTER)
            numbers, lse = collect(
                mine, row, cols, live, rows, capacity, rank, epoch, fault, timeout_ns, DV, WORLD, W_PAD, UD
            )
            if sinks is not None:  # one more key, of value 0
                sink = tl.load(sinks + row % H, mask=live, other=0.0).to(tl.float32)
                numbers /= 1 + tl.exp(sink[:, None] - tl.where(lse == float("-inf"), 0.0, lse))
            at = out_place(row, H, WORLD, SCATTER)
            tl.store(
                out + at[:, None] * DV + cols[None, :], numbers.to(out.dtype.element_ty),
                mask=live[:, None] & (cols < DV)[None, :],
            )
        keep_epoch(epochs, program, programs, epoch)
