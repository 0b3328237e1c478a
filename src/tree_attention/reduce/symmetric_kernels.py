"""The exchange over memory that all ranks can write: push packets, wait for the others', merge in rank order.

A rank's buffer is int64 `[2 slots, ranks, capacity]`. Rank r writes section r of every rank's buffer, its own included,
so that all ranks merge the same numbers in the same order and get the same bits. A section holds `[rows, DV]` numbers,
then `[rows, DV / UD]` log-sum-exps, one for each unit that needs it.

Two alternating slots suffice: a rank pushes epoch e + 2 only after it has every rank's e + 1, which that rank pushed
after its own epoch e had ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..packets import receive, send

LAST_EPOCH: tl.constexpr = tl.constexpr(0x7FFFFFFE)  # even: slots keep alternating when the epochs wrap to 1
EPOCHS: tl.constexpr = tl.constexpr(1024)  # counters, one per program; more than any GPU has multiprocessors


@triton.jit
def exchange_kernel(
    out, lse, buffers, mine, epochs, fault, merged_out, merged_lse, rows, H, capacity, rank, timeout_ns,
    DV: tl.constexpr, WORLD: tl.constexpr, W_PAD: tl.constexpr, UR: tl.constexpr, UD: tl.constexpr,
    SCATTER: tl.constexpr, PUSH: tl.constexpr, COLLECT: tl.constexpr, PDL: tl.constexpr,
):
    """Merge out `[rows, DV]` and lse `[rows]`, float32, over the ranks; with SCATTER, this rank's heads only."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if PDL:
        gdc_wait()
    epoch = next_epoch(epochs, program)
    per_row: tl.constexpr = (DV + UD - 1) // UD
    units = tl.cdiv(rows, UR) * per_row
    if PUSH:
        for unit in range(program, units, programs):
            row = unit // per_row * UR + tl.arange(0, UR)
            cols = unit % per_row * UD + tl.arange(0, UD)
            live = row < rows
            numbers = tl.load(out + row[:, None] * DV + cols[None, :], mask=live[:, None] & (cols < DV)[None, :])
            row_lse = tl.load(lse + row[:, None] + 0 * cols[None, :], mask=live[:, None])
            push(buffers, numbers, row_lse, row, cols, live, rows, H, capacity, rank, epoch, DV, WORLD, UD, SCATTER)
    if PDL:
        gdc_launch_dependents()
    if COLLECT:
        for unit in range(program, units, programs):
            row = unit // per_row * UR + tl.arange(0, UR)
            cols = unit % per_row * UD + tl.arange(0, UD)
            live = own(row, rows, H, rank, WORLD, SCATTER)
            numbers, row_lse = collect(
                mine, row, cols, live, rows, capacity, rank, epoch, fault, timeout_ns, DV, WORLD, W_PAD, UD
            )
            at = out_place(row, H, WORLD, SCATTER)
            tl.store(merged_out + at[:, None] * DV + cols[None, :], numbers, live[:, None] & (cols < DV)[None, :])
            tl.store(merged_lse + at[:, None] + 0 * cols[None, :], row_lse, live[:, None] & (cols == 0)[None, :])
        keep_epoch(epochs, program, programs, epoch)


@triton.jit
def next_epoch(epochs, program):
    """Return the epoch of this launch from this program's own counter; never 0, the content of fresh memory."""
    return tl.load(epochs + program) % LAST_EPOCH + 1


@triton.jit
def keep_epoch(epochs, program, programs, epoch):
    """Count this launch, also in the counters that only larger launches use. No two programs share a counter."""
    counter = program + tl.arange(0, EPOCHS) * programs
    tl.store(epochs + counter, tl.zeros([EPOCHS], tl.int32) + epoch, mask=counter < EPOCHS)


@triton.jit
def push(
    buffers, numbers, lse, row, cols, live, rows, H, capacity, rank, epoch,
    DV: tl.constexpr, WORLD: tl.constexpr, UD: tl.constexpr, SCATTER: tl.constexpr,
):
    """Push rows `row` `[UR]`, columns `cols` `[UD]` to every rank; with SCATTER, each row to its head's rank only."""
    per_row: tl.constexpr = (DV + UD - 1) // UD
    place = ((epoch & 1) * WORLD + rank).to(tl.int64) * capacity
    at = row.to(tl.int64)
    lse_at = place + rows * DV + (at * per_row + tl.min(cols, 0) // UD)[:, None] + 0 * cols[None, :]
    first = (cols % UD == 0)[None, :]
    for peer in tl.static_range(WORLD):
        to = live & (row % H // (H // WORLD) == peer) if SCATTER else live
        send(
            buffers[peer] + place + at[:, None] * DV + cols[None, :], numbers, epoch, to[:, None] & (cols < DV)[None, :]
        )
        send(buffers[peer] + lse_at, lse, epoch, to[:, None] & first)


@triton.jit
def collect(
    mine, row, cols, live, rows, capacity, rank, epoch, fault, timeout_ns,
    DV: tl.constexpr, WORLD: tl.constexpr, W_PAD: tl.constexpr, UD: tl.constexpr,
):
    """Wait for all ranks' packets of these rows and columns and merge them: out and natural lse, both `[UR, UD]`."""
    per_row: tl.constexpr = (DV + UD - 1) // UD
    ranks = tl.arange(0, W_PAD)
    place = ((epoch & 1) * WORLD + ranks).to(tl.int64)[:, None, None] * capacity
    at = row.to(tl.int64)[None, :, None]
    here = (ranks < WORLD)[:, None, None] & live[None, :, None] & (cols < DV)[None, None, :]  # [W_PAD, UR, UD]
    lse_at = mine + place + rows * DV + at * per_row + tl.min(cols, 0) // UD + 0 * cols[None, None, :]
    out, lse = receive(
        mine + place + at * DV + cols[None, None, :], lse_at, here, epoch, fault + ranks[:, None, None], timeout_ns
    )
    lse = tl.where(here, lse, float("-inf"))
    peak = tl.max(lse, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(lse - shift[None, :, :])
    total = tl.sum(weight, 0)
    safe = tl.maximum(total, 1.0)  # total is 0 where no rank has a key, else at least 1
    return tl.sum(weight * out, 0) / safe, tl.where(total > 0, shift + tl.log(safe), float("-inf"))


@triton.jit
def own(row, rows, H, rank, WORLD: tl.constexpr, SCATTER: tl.constexpr):
    """Return which rows this rank keeps."""
    if SCATTER:
        return (row < rows) & (row % H // (H // WORLD) == rank)
    else:
        return row < rows


@triton.jit
def out_place(row, H, WORLD: tl.constexpr, SCATTER: tl.constexpr):
    """Return the output row: of `[B T H, DV]`, or with SCATTER of `[B T H / WORLD, DV]`."""
    row = row.to(tl.int64)
    if SCATTER:
        return row // H * (H // WORLD) + row % H % (H // WORLD)
    else:
        return row
