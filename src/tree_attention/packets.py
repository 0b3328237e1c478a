"""Packets for Triton kernels: numbers that carry their own flag, so that reading them needs no fence.

A packet is 8 bytes, half float32 and half epoch. An aligned 8-byte store is atomic, in the chip's L2 and over NVLink.
So neither side needs a barrier or a fence: the writer stores, and the reader polls until it sees the epoch that it
waits for. `SharedMemoryLink` uses the same protocol between CPU processes.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

UNIT_PACKETS = 1024  # that a program waits for at once


def unit_shape(max_rows: int, rows: int, columns: int, *, groups: int, programs: int, depth: int) -> tuple[int, int]:
    """Return (UR, UD): rows and columns that a program merges at once, `depth` numbers for each element.

    A unit has at most UNIT_PACKETS packets, and is small enough that every program gets one of the units of `groups`
    blocks `[rows, columns]`. It decides where packets lie, so all ranks compute it from what they share.
    """
    UR, UD = max_rows, min(max(1 << (columns - 1).bit_length(), 16), 128)
    while (UR > 1 or UD > 16) and (
        UR * UD * depth > UNIT_PACKETS or groups * -(-rows // UR) * -(-columns // UD) < programs
    ):
        UR, UD = (UR // 2, UD) if UR > 1 else (UR, UD // 2)
    return UR, UD


@triton.jit
def send(pointers, numbers, epoch, mask):
    """Store `numbers`, as float32, in packets of `epoch` (int32) at int64 `pointers`."""
    low = numbers.to(tl.float32).to(tl.uint32, bitcast=True).to(tl.int64)
    # write through L1, to the peer
    tl.store(pointers, low | (epoch.to(tl.int64) << 32), mask=mask, cache_modifier=".wt")


@triton.jit
def receive(pointers, lse_pointers, mask, epoch, fault, timeout_ns):
    """Wait for packets of `epoch`; return (numbers, their log-sum-exps), float32, 0 where the mask is false.

    All tensors have one shape. Each thread waits for its own packets, and no control flow depends on what another
    thread read: threads that poll one address may see it change at different times. A thread polls all its packets at
    once, since one load takes as long as many. After timeout_ns it writes 1 to the packet's `fault` address, which the
    host can read, and traps, which ends the CUDA context. If the host writes there, it stops waiting, with undefined
    numbers. With timeout_ns None it does not wait.
    """
    if timeout_ns is None:
        packets, lse_packets = tl.load(pointers, mask=mask, other=0), tl.load(lse_pointers, mask=mask, other=0)
    else:
        threads: tl.constexpr = num_threads()
        each: tl.constexpr = (pointers.numel + threads - 1) // threads
        nowhere = tl.zeros(pointers.shape, tl.int64)
        packets, lse_packets = tl.inline_asm_elementwise(
            _receive_asm(each),
            _receive_constraints(each),
            [
                tl.where(mask, pointers.to(tl.int64), nowhere),
                tl.where(mask, lse_pointers.to(tl.int64), nowhere),
                nowhere.to(tl.int32) + epoch,
                fault.to(tl.int64) + nowhere,
                nowhere + timeout_ns,
            ],
            dtype=(tl.int64, tl.int64),
            is_pure=False,
            pack=each,
        )
    return _number(packets), _number(lse_packets)


@triton.jit
def _number(packets):
    return (packets & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _receive_constraints(each):
    return ",".join(["=&l"] * 2 * each + ["l"] * 2 * each + ["r"] * each + ["l"] * 2 * each)


@triton.constexpr_function
def _receive_asm(each):
    """Return PTX that loads a thread's `each` pairs of packets, all at once, until every flag is the epoch."""
    packets, first = 2 * each, 2 * each
    epoch, faults, timeout = f"${4 * each}", 5 * each, f"${6 * each}"
    load = [f"@%has{i % each} ld.volatile.global.b64 ${i}, [${first + i}];" for i in range(packets)]
    test = [f"mov.b64 {{%low, %high}}, ${i}; setp.eq.and.u32 %all, %high, {epoch}, %all;" for i in range(packets)]
    stop = [
        f"mov.u32 %low, 0; @%has{i} ld.volatile.global.b32 %low, [${faults + i}]; setp.ne.or.u32 %late, %low, 0, %late;"
        for i in range(each)
    ]
    note = [
        f"mov.b64 {{%low, %high}}, ${i}; setp.ne.u32 %late, %high, {epoch};"
        f"@%late st.volatile.global.b32 [${faults + i % each}], 1;"
        for i in range(packets)
    ]
    return "\n".join(
        [
            "{",
            f".reg .pred %has<{each}>, %all, %late; .reg .b32 %low, %high, %looks; .reg .b64 %begin, %now;",
            *[f"setp.ne.u64 %has{i}, ${first + i}, 0;" for i in range(each)],
            *[f"mov.b64 ${i}, {{0, {epoch}}};" for i in range(packets)],
            "mov.u32 %looks, 0;",
            "AGAIN:",
            *load,
            "setp.eq.u32 %all, %looks, %looks;",
            *test,
            "@%all bra DONE;",
            "add.u32 %looks, %looks, 1; and.b32 %low, %looks, 1023; setp.ne.u32 %late, %low, 0; @%late bra AGAIN;",
            *stop,
            "@%late bra DONE;",
            "mov.u64 %now, %globaltimer; setp.eq.u32 %late, %looks, 1024; @%late mov.u64 %begin, %now;",
            f"sub.u64 %now, %now, %begin; setp.lt.u64 %late, %now, {timeout}; @%late bra AGAIN;",
            *note,
            "fence.acq_rel.sys; trap;",
            "DONE:",
            "bar.warp.sync 0xffffffff;",
            "}",
        ]
    )
