"""A kernel that only reads. Its bandwidth is the ceiling for decoding, which reads each key and value once."""

import triton
import triton.language as tl


@triton.jit
def read(source, sums, count, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Program p of P stores the sum of blocks p, p + P, ... of `source`, int32 `[count]`, in sums[p], int64.

    ROUNDS: `count // (P * BLOCK)`, the number of full blocks per program, read without a mask, 16 bytes per load. The
    int32 sum of a lane may overflow.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.range(0, ROUNDS, num_stages=STAGES):
        total += tl.load(source + (i * programs + program) * BLOCK + lane)
    rest = (ROUNDS * programs + program) * BLOCK
    total += tl.load(source + rest + lane, mask=lane < count - rest, other=0)
    tl.store(sums + program, tl.sum(total.to(tl.int64)))
