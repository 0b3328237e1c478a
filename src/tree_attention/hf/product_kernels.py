"""Multiply one vector by several matrices in one launch. Each row is read once, contiguously."""

import triton
import triton.language as tl


@triton.jit
def products_kernel(x, weights, sizes, out, K: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr):
    """x `[K]`, COUNT row-major weights `[N_i, K]` and their sizes N_i -> out float32 `[sum of N_i]`.

    Each program computes one row. It sums in float32, in an order that depends on K and COLS only.
    """
    program, first = tl.program_id(0), 0
    for i in tl.static_range(COUNT):
        if (program >= first) & (program < first + sizes[i]):
            row = weights[i] + (program - first).to(tl.int64) * K
            total = tl.zeros((COLS,), tl.float32)
            for start in range(0, K, COLS):
                col = start + tl.arange(0, COLS)
                numbers = tl.load(row + col, mask=col < K, other=0.0, eviction_policy="evict_first").to(tl.float32)
                total += numbers * tl.load(x + col, mask=col < K, other=0.0).to(tl.float32)
            tl.store(out + program, tl.sum(total, 0))
        first += sizes[i]
