"""Split-KV decoding in Triton: persistent programs share the tiles of keys evenly and merge their parts in order.

Terms: a *group* is one (batch row, KV head) with its `M = T G` query rows, `G = H / H_kv`, row `m = t G + g`. A *tile*
is BN keys of a group. A *part* is the result of one program on one group; its index among the parts is
`program + group`, which is unique, since programs take the groups in order. A *unit* is what one program merges at
once: UR rows and UD columns of a group.

Work division after LeanAttention (arXiv 2405.10480): the tiles of all groups form one sequence, which is split into
equal ranges. It is computed here from lengths in device memory, so a captured graph replays with any lengths.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..packets import receive, send

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
NO_SCORE: tl.constexpr = tl.constexpr(-1.0e30)  # finite: -inf - -inf would be NaN


@triton.jit
def split_kernel(
    tensors, strides, sizes, factors, parts,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, B_PAD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):
    """Compute the parts of all tiles. Arguments as in `split`."""
    if PDL:
        gdc_wait()
    work = divide(tensors[3], sizes, tl.num_programs(0), BN, B_PAD)
    epoch = tl.full([], 1, tl.int32)
    split(tensors, strides, sizes, factors, work, parts, epoch, G, BM, BN, D, DV, D_PAD, DV_PAD, B_PAD, EVEN, STAGES)
    if PDL:
        gdc_launch_dependents()


@triton.jit
def merge_kernel(
    lens, parts, out, lse, sizes, programs,
    G: tl.constexpr, BN: tl.constexpr, DV: tl.constexpr, B_PAD: tl.constexpr,
    UR: tl.constexpr, UD: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):
    """Merge the parts of `split_kernel`, run on `programs` programs: out `[B, T, H, DV]`, lse `[B, T, H]`, float32."""
    if PDL:
        gdc_wait()
    B, T, H_kv, epoch = sizes[0], sizes[1], sizes[3], tl.full([], 1, tl.int32)
    work = divide(lens, sizes, programs, BN, B_PAD)
    group, m, cols = unit_at(tl.program_id(0), T * G, UR, UD, DV)
    first, last = contributors(group, work, B, H_kv, B_PAD)
    total, row_lse = merge_parts(parts, epoch, sizes, programs, first, last, group, m, cols, None, None, G, DV, PARTS)
    row = out_row(group, m, B, T, H_kv, G)
    live = (m < T * G)[:, None] & (cols < DV)[None, :]
    tl.store(out + row[:, None] * DV + cols[None, :], total, mask=live)
    tl.store(lse + row[:, None] + 0 * cols[None, :], row_lse, mask=live & (cols == 0)[None, :])


@triton.jit
def split(
    tensors, strides, sizes, factors, work, parts, epoch,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, B_PAD: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):
    """Compute this program's parts and store them as packets of `epoch`.

    tensors: q, k, v; and each of these or None: lens `[B]` or `[B, T]`, page_table `[B, pages]`, q_positions
        `[B or 1, T]`, k_positions `[B or 1, S]`, mask `[B or 1, H or 1, T, S]`, and lens again if it is `[B, T]`.
    strides: of q (b, t, h), k (b or page, s, h), v likewise, page_table (b), q_positions (b, t), k_positions (b, s),
        mask (b, h, t, s); 0 where a dim is broadcast.
    sizes: B, T, S, H_kv, page_size, and the stride of lens. factors: scale log2(e), softcap and window, the last two or
        None. work: `divide`.
    parts: packets, int64: `[programs + groups, M, DV]` numbers, then `[programs + groups, M]` log-sum-exps in base 2.
    """
    B, T, _, H_kv, _, _ = sizes
    M = T * G
    program, programs = tl.program_id(0), tl.num_programs(0)
    peak, total = tl.full([BM], NO_SCORE, tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DV_PAD], tl.float32)
    tile, end = first_tile(program, work), first_tile(program + 1, work)
    group, start, tiles, keys = group_at(tl.minimum(tile, work[5] - 1), work, B, H_kv, B_PAD)
    if B_PAD > 0:  # one pipeline through groups of any length
        for at in tl.range(tile, end, num_stages=STAGES):
            q_rows = query_rows(tensors[0], strides[0], group, B, M, G, BM, D, D_PAD)
            peak, total, acc = attend_tile(
                tensors, strides, sizes, factors, q_rows, group, at - start, keys, peak, total, acc,
                G, BM, BN, D, DV, D_PAD, DV_PAD, EVEN,
            )
            group_ends = at + 1 == start + tiles
            if group_ends | (at + 1 == end):
                store_part(parts, epoch, program + group, programs + B * H_kv, M, peak, total, acc, BM, DV, DV_PAD)
            peak, total = tl.where(group_ends, NO_SCORE, peak), tl.where(group_ends, 0.0, total)
            acc = tl.where(group_ends, 0.0, acc)
            start = tl.where(group_ends, start + tiles, start)
            group = tl.where(group_ends, group + 1, group)
            here = tl.arange(0, B_PAD) == group % B
            keys, tiles = tl.sum(tl.where(here, work[1], 0), 0), tl.sum(tl.where(here, work[0], 0), 0)
    else:  # one pipeline per group: less work per tile, and queries stay in registers
        first = tile
        while tile < end:
            stop = tl.minimum(end, start + tiles)
            base, step = tile_order(program, first, start, tiles, work)
            q_rows = query_rows(tensors[0], strides[0], group, B, M, G, BM, D, D_PAD)
            peak, total = tl.full([BM], NO_SCORE, tl.float32), tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, DV_PAD], tl.float32)
            for at in tl.range(tile, stop, num_stages=STAGES):
                peak, total, acc = attend_tile(
                    tensors, strides, sizes, factors, q_rows, group, base + at * step, keys, peak, total, acc,
                    G, BM, BN, D, DV, D_PAD, DV_PAD, EVEN,
                )
            store_part(parts, epoch, program + group, programs + B * H_kv, M, peak, total, acc, BM, DV, DV_PAD)
            tile, start, group = stop, start + tiles, group + 1


@triton.jit
def query_rows(q, strides, group, B, M, G: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Load the queries of a group, `[BM, D_PAD]`."""
    m, dims = tl.arange(0, BM), tl.arange(0, D_PAD)
    base = q + (group % B).to(tl.int64) * strides[0] + group // B * G * strides[2]
    at = base + (m // G * strides[1] + m % G * strides[2])[:, None] + dims[None, :]
    return tl.load(at, mask=(m < M)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def attend_tile(
    tensors, strides, sizes, factors, q_rows, group, tile, length, peak, total, acc,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, EVEN: tl.constexpr,
):
    """Add a tile; return the new (largest score, sum of weights, weighted sum of values), scores in base 2.

    EVEN: all tiles are full and all dims are powers of two, so no load needs a mask.
    """
    _, k, v, _, page_table, q_positions, k_positions, mask, by_query = tensors
    _, k_strides, v_strides, table_stride, q_pos_strides, k_pos_strides, mask_strides = strides
    B, T, _, _, page_size, _ = sizes
    scale, softcap, window = factors
    m, offsets, dims, v_dims = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    t, g = m // G, m % G
    b, head = (group % B).to(tl.int64), (group // B).to(tl.int64)
    begin = tile * BN
    keys = begin + offsets
    live = keys < length
    k_base, v_base = k + head * k_strides[2], v + head * v_strides[2]
    if page_table is None:
        k_rows = k_base + b * k_strides[0] + begin.to(tl.int64) * k_strides[1] + offsets * k_strides[1]
        v_rows = v_base + b * v_strides[0] + begin.to(tl.int64) * v_strides[1] + offsets * v_strides[1]
    else:
        page = tl.load(page_table + b * table_stride + keys // page_size, mask=live, other=0).to(tl.int64)
        place = (keys % page_size).to(tl.int64)
        k_rows = k_base + page * k_strides[0] + place * k_strides[1]
        v_rows = v_base + page * v_strides[0] + place * v_strides[1]
    scores = tl.dot(q_rows, tl.trans(_rows(k_rows, dims, live, D, D_PAD, EVEN))) * scale
    if softcap is not None:  # in base 2: cap' tanh(s / cap'), cap' = cap log2(e)
        cap = softcap * 1.4426950408889634
        scores = cap - 2 * cap / (tl.exp2(scores * (2 / softcap)) + 1)
    if not EVEN:
        seen = live[None, :] & (m < T * G)[:, None]
        if by_query is not None:
            limits = tl.load(by_query + b * T + t, mask=t < T, other=0)
            seen &= keys[None, :] < limits[:, None]
        if k_positions is not None:
            q_pos = tl.load(q_positions + b * q_pos_strides[0] + t * q_pos_strides[1], mask=t < T, other=0)
            k_pos = tl.load(k_positions + b * k_pos_strides[0] + keys * k_pos_strides[1], mask=live, other=0)
            seen &= k_pos[None, :] <= q_pos[:, None]
            if window is not None:
                seen &= k_pos[None, :] > q_pos[:, None] - window
        if mask is not None:
            mask_rows = mask + b * mask_strides[0] + (head * G + g) * mask_strides[1] + t * mask_strides[2]
            mask_at = mask_rows[:, None] + (keys.to(tl.int64) * mask_strides[3])[None, :]
            seen &= tl.load(mask_at, mask=seen, other=0) != 0
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    keep = tl.exp2(peak - new_peak)
    values = _rows(v_rows, v_dims, live, DV, DV_PAD, EVEN)
    acc = tl.dot(weights.to(values.dtype), values, acc * keep[:, None])
    return new_peak, total * keep + tl.sum(weights, 1), acc


@triton.jit
def store_part(
    parts, epoch, index, count, M, peak, total, acc, BM: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr
):
    """Store part `index` of `count`: out and lse in base 2, (0, -inf) if no key was seen."""
    m, v_dims = tl.arange(0, BM), tl.arange(0, DV_PAD)
    at = (index * M + m).to(tl.int64)
    some = total > 0
    safe = tl.where(some, total, 1.0)
    out_live = (m < M)[:, None] & (v_dims < DV)[None, :]
    send(parts + at[:, None] * DV + v_dims[None, :], acc / safe[:, None], epoch, out_live)
    send(parts + count * M * DV + at, tl.where(some, peak + tl.log2(safe), float("-inf")), epoch, m < M)


@triton.jit
def _rows(pointers, dims, live, D: tl.constexpr, D_PAD: tl.constexpr, EVEN: tl.constexpr):
    """Load rows of k or v; zeros past the end, so that unused memory does not count, not even NaN."""
    at = pointers[:, None] + dims[None, :]
    if EVEN:
        return tl.load(at)
    elif D == D_PAD:
        return tl.load(at, mask=live[:, None], other=0.0)
    else:
        return tl.load(at, mask=live[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def prefetch(tensors, strides, sizes, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, B_PAD: tl.constexpr):
    """Prefetch this program's first tile to L2 while the previous kernel still runs.

    This is safe whatever that kernel writes: its stores go to L2 too, and values are only used if read after
    `gdc_wait`. Only addresses that the host knows are prefetched, so neither ragged nor paged caches.
    """
    k, v, page_table = tensors[1], tensors[2], tensors[4]
    _, k_strides, v_strides, _, _, _, _ = strides
    if tensors[3] is None and page_table is None:
        B, S, H_kv = sizes[0], sizes[2], sizes[3]
        work = divide(None, sizes, tl.num_programs(0), BN, B_PAD)
        tile = tl.minimum(first_tile(tl.program_id(0), work), work[5] - 1)
        group, start, tiles, _ = group_at(tile, work, B, H_kv, B_PAD)
        b, head = (group % B).to(tl.int64), (group // B).to(tl.int64)
        base, step = tile_order(tl.program_id(0), tile, start, tiles, work)
        key = tl.minimum((base + tile * step) * BN + tl.arange(0, BN), S - 1).to(tl.int64)
        k_rows = k + b * k_strides[0] + head * k_strides[2] + key * k_strides[1]
        v_rows = v + b * v_strides[0] + head * v_strides[2] + key * v_strides[1]
        if S > 0:
            for line in tl.static_range(0, D, 64):  # 64 16-bit numbers are one line of L2
                _prefetch_line(k_rows + line)
            for line in tl.static_range(0, DV, 64):
                _prefetch_line(v_rows + line)


@triton.jit
def _prefetch_line(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def merge_parts(
    parts, epoch, sizes, programs, first, last, group, m, cols, fault, timeout_ns,
    G: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr,
):
    """Merge the parts of programs `first` to `last` in order, PARTS at a time: out and natural lse, both `[UR, UD]`."""
    B, T, _, H_kv, _, _ = sizes
    M = T * G
    shape: tl.constexpr = [m.shape[0], cols.shape[0]]
    peak, total, acc = tl.full(shape, NO_SCORE, tl.float32), tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)
    for at in range(first, last + 1, PARTS):
        program = (at + tl.arange(0, PARTS))[:, None, None]
        live = (program <= last) & (m < M)[None, :, None] & (cols < DV)[None, None, :]  # [PARTS, UR, UD]
        row = ((program + group) * M + m[None, :, None]).to(tl.int64)
        lse_at = parts + (programs + B * H_kv) * M * DV + row + 0 * cols[None, None, :]
        out, lse = receive(parts + row * DV + cols[None, None, :], lse_at, live, epoch, fault, timeout_ns)
        lse = tl.where(live, lse, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weight, keep = tl.exp2(lse - new_peak[None, :, :]), tl.exp2(peak - new_peak)
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(weight * out, 0)
        peak = new_peak
    some = total > 0
    safe = tl.where(some, total, 1.0)
    return acc / safe, tl.where(some, (peak + tl.log2(safe)) * LN2, float("-inf"))


@triton.jit
def unit_at(unit, M, UR: tl.constexpr, UD: tl.constexpr, DV: tl.constexpr):
    """Return (group, rows `[UR]`, columns `[UD]`) of a unit; rows and columns may lie past the end."""
    per_row: tl.constexpr = (DV + UD - 1) // UD
    block, column = unit // per_row, unit % per_row
    blocks = tl.cdiv(M, UR)
    return block // blocks, block % blocks * UR + tl.arange(0, UR), column * UD + tl.arange(0, UD)


@triton.jit
def out_row(group, m, B, T, H_kv, G: tl.constexpr):
    """Return the row of `[B T H, DV]` of row `m` of a group."""
    return ((group % B * T + m // G) * H_kv + group // B).to(tl.int64) * G + m % G


@triton.jit
def divide(lens, sizes, programs, BN: tl.constexpr, B_PAD: tl.constexpr):
    """Return (tiles of a group, keys, end of the row's tiles, span, splits, all tiles); the first three by batch row.

    Each `span` consecutive tiles are split evenly among `splits` programs. If the groups have equal lengths and fill
    most of the programs, a span is a group, and no program has parts of two groups; otherwise it is all tiles. A group
    without keys has one tile, so that it gets a result too. With one row or without lens, B_PAD is 0 and the first
    three are scalars. With lens `[B, T]`, a row has as many keys as its last query sees.
    """
    B, _, S, H_kv, _, lens_stride = sizes
    if B_PAD == 0:
        keys = S if lens is None else tl.load(lens + lens_stride - 1).to(tl.int32)
        tiles, ends = tl.maximum(tl.cdiv(keys, BN), 1), 0
        longest, total = tiles, tiles * B * H_kv
    else:
        row = tl.arange(0, B_PAD)
        keys = tl.load(lens + (row + 1) * lens_stride - 1, mask=row < B, other=0).to(tl.int32)
        tiles = tl.where(row < B, tl.maximum(tl.cdiv(keys, BN), 1), 0)
        ends = tl.cumsum(tiles, 0)
        longest, total = tl.max(tiles, 0), tl.sum(tiles, 0) * H_kv
    splits = programs // (B * H_kv)
    whole = (total == longest * B * H_kv) & (splits * B * H_kv * 16 >= programs * 15)
    span = tl.where(whole, longest, total)
    return tiles, keys, ends, span, tl.minimum(tl.where(whole, splits, programs), span), total


@triton.jit
def first_tile(program, work):
    """Return the first of a program's tiles; that of `program + 1` is the end."""
    _, _, _, span, splits, total = work
    place = program % splits
    each, over = span // splits, span % splits
    return tl.minimum(program // splits * span + place * each + tl.minimum(place, over), total)


@triton.jit
def tile_order(program, first, start, tiles, work):
    """Return (base, step): loop index `at`, starting at `first`, maps to tile `base + at * step` of the group.

    Programs that share one group, and have no other, take its tiles round-robin: some lengths are 6 % faster then.
    """
    _, _, _, span, splits, _ = work
    shared = span == tiles
    return tl.where(shared, program % splits - first * splits, -start), tl.where(shared, splits, 1)


@triton.jit
def program_of(tile, work):
    """Return the program that has a tile; the inverse of `first_tile`."""
    _, _, _, span, splits, _ = work
    place = tile % span
    each, over = span // splits, span % splits
    early = over * (each + 1)  # tiles of the programs that have one more
    late = over + tl.maximum(place - early, 0) // each
    return tile // span * splits + tl.where(place < early, place // (each + 1), late)


@triton.jit
def group_at(tile, work, B, H_kv, B_PAD: tl.constexpr):
    """Return (group, its first tile, number of tiles, keys) of a tile."""
    tiles, keys, ends, _, _, total = work
    if B_PAD == 0:
        return tile // tiles, tile // tiles * tiles, tiles, keys
    else:
        of_head = total // H_kv
        b = tl.sum((ends <= tile % of_head).to(tl.int32), 0)
        here = tl.arange(0, B_PAD) == b
        count = tl.sum(tl.where(here, tiles, 0), 0)
        end = tl.sum(tl.where(here, ends, 0), 0)
        start = tile // of_head * of_head + end - count
        return tile // of_head * B + b, start, count, tl.sum(tl.where(here, keys, 0), 0)


@triton.jit
def contributors(group, work, B, H_kv, B_PAD: tl.constexpr):
    """Return the first and the last program that have tiles of a group."""
    tiles, _, ends, _, _, total = work
    if B_PAD == 0:
        start, count = group * tiles, tiles
    else:
        here = tl.arange(0, B_PAD) == group % B
        count = tl.sum(tl.where(here, tiles, 0), 0)
        start = group // B * (total // H_kv) + tl.sum(tl.where(here, ends, 0), 0) - count
    return program_of(start, work), program_of(start + count - 1, work)
