"""Our Triton kernels without GPUs: the work division, the exchange between simulated ranks, and what a compiler says.

The kernels run in Triton's interpreter (conftest.py), one program after the other, so their steps are launched one
after the other, too, and nothing waits. On a machine with CUDA the same tests run on the device.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tree_attention import InputError, Partial, SymmetricLink, Unavailable, attend, explain, merge
from tree_attention.fused import ranks_padded
from tree_attention.fused_kernels import fused_kernel
from tree_attention.hf.compile_pass import COLS, WARPS
from tree_attention.hf.product_kernels import products_kernel
from tree_attention.local import AttentionCall, KeySelection, triton_decode
from tree_attention.local.triton_decode import _launched, plan_launch, split_arguments
from tree_attention.local.triton_kernels import (
    contributors,
    divide,
    first_tile,
    group_at,
    merge_kernel,
    program_of,
    split_kernel,
)
from tree_attention.partial import empty, stack
from tree_attention.reduce.symmetric import exchange_unit
from tree_attention.reduce.symmetric_kernels import exchange_kernel
from tree_attention.testing import assert_within_rounding, oracle, peaked_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = "efficient" if torch.cuda.is_available() else "cpu_flash"
LAST_EPOCH = 0x7FFFFFFE
NAN_PACKET = 0x7FC00000  # epoch 0
BN = 16


@triton.jit
def division_kernel(
    lens, sizes, programs, first, owner, tiles_of, groups_of,
    BN: tl.constexpr, B_PAD: tl.constexpr, PROGRAMS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What the helpers say: of programs `0 .. programs`, of every tile, of every group."""
    work = divide(lens, sizes, programs, BN, B_PAD)
    total, B, H_kv = work[5], sizes[0], sizes[3]
    program, tile = tl.arange(0, PROGRAMS), tl.arange(0, TILES)
    tl.store(first + program, first_tile(program, work), mask=program <= programs)
    tl.store(owner + tile, program_of(tile, work), mask=tile < total)
    for at in range(total):
        group, start, count, keys = group_at(at, work, B, H_kv, B_PAD)
        tl.store(tiles_of + at * 4, group)
        tl.store(tiles_of + at * 4 + 1, start)
        tl.store(tiles_of + at * 4 + 2, count)
        tl.store(tiles_of + at * 4 + 3, keys)
    for group in range(B * H_kv):
        begin, last = contributors(group, work, B, H_kv, B_PAD)
        tl.store(groups_of + group * 2, begin)
        tl.store(groups_of + group * 2 + 1, last)


def division(lengths, equal, H_kv, programs, tiles):
    """(first tiles, owners, (group, start, tiles, keys) of each tile, (first, last program) of each group) as lists."""
    B = len(lengths)
    here = {"dtype": torch.int32, "device": DEVICE}
    first, owner = torch.full((programs + 1,), -1, **here), torch.full((tiles,), -1, **here)
    tiles_of, groups_of = torch.full((tiles, 4), -1, **here), torch.full((B * H_kv, 2), -1, **here)
    division_kernel[(1,)](
        None if equal else torch.tensor(lengths, **here), (B, 1, max(lengths), H_kv, 1, 1), programs,
        first, owner, tiles_of, groups_of, BN=BN, B_PAD=0 if equal else max(triton.next_power_of_2(B), 2),
        PROGRAMS=triton.next_power_of_2(programs + 1), TILES=triton.next_power_of_2(tiles),
    )  # fmt: skip
    return [t.tolist() for t in (first, owner, tiles_of, groups_of)]


DIVISIONS = {  # lengths of the rows, KV heads, programs
    "one group": ([137], 1, 4),
    "one program": ([40, 40], 2, 1),
    "fewer tiles than programs": ([20, 20], 1, 13),
    "no keys": ([0, 0, 0], 2, 4),
    "a span is a group": ([90, 90], 2, 12),
    "groups fill 15 of 16 programs": ([90, 90, 90], 1, 16),
    "groups leave programs over": ([90, 90, 90], 1, 11),
    "many groups": ([17] * 5, 3, 4),
    "ragged": ([33, 0, 129, 1, 16], 2, 7),
    "ragged, one program": ([33, 0, 5], 1, 1),
    "ragged, fewer tiles than programs": ([0, 17], 1, 9),
    "ragged, of one length": ([90, 90], 2, 12),
    "ragged, in tiles of one length": ([90, 81], 2, 8),
    "ragged, one long row": ([1, 1, 300, 1], 1, 6),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_every_tile_has_one_owner(name):
    lengths, H_kv, programs = DIVISIONS[name]
    counts = [max(-(-length // BN), 1) for length in lengths]
    starts, expected = [], []
    for group in range(H_kv * len(lengths)):  # row after row of the first KV head, then of the second
        b = group % len(lengths)
        starts.append(len(expected))
        expected += [[group, starts[-1], counts[b], lengths[b]]] * counts[b]
    first, owner, tiles_of, groups_of = division(lengths, "ragged" not in name, H_kv, programs, len(expected))
    assert tiles_of == expected
    assert first[0] == 0
    assert first[-1] == len(expected)
    assert first == sorted(first)
    assert owner == [p for p in range(programs) for _ in range(first[p], first[p + 1])]
    shares = [first[p + 1] - first[p] for p in range(programs)]
    splits = programs // len(starts)
    if len(set(counts)) == 1 and splits * len(starts) * 16 >= programs * 15:  # whole groups to programs of their own
        assert max(shares) == -(-counts[0] // min(splits, counts[0]))
        assert all(len({expected[t][0] for t in range(first[p], first[p + 1])}) <= 1 for p in range(programs))
    else:
        assert max(shares) - min(shares) <= 1
    slots = set()
    for group, (start, end) in enumerate(zip(starts, [*starts[1:], len(expected)], strict=True)):
        owners = owner[start:end]
        assert groups_of[group] == [owners[0], owners[-1]]
        assert sorted(set(owners)) == list(range(owners[0], owners[-1] + 1))  # the merge waits for all between
        slots |= {p + group for p in owners}
    assert len(slots) == len({(p, tile[0]) for p, tile in zip(owner, expected, strict=True)})
    assert max(slots) < programs + len(starts)


@pytest.mark.parametrize(
    ("groups", "alike", "launched"),
    [
        (8, True, 128), (8, False, 128), (128, True, 128), (132, True, 132), (100, True, 132), (512, True, 128),
        (512, False, 132), (511, True, 132), (264, True, 132), (200, True, 132),
    ],
)  # fmt: skip
def test_programs_share_the_groups_evenly_where_nearly_all_can(groups, alike, launched):
    assert _launched(groups, 132, equal_lengths=alike) == launched


def fused_arguments(q, k, v, lens, *, cut, sinks, buffers, rank, epochs, parts, fault, out, capacity, scatter, **how):
    """All arguments of `fused_kernel`, by name; `how` may replace any."""
    tensors, strides, sizes, factors = split_arguments(
        AttentionCall(q, k, v, KeySelection(local_seqlens=lens), q.shape[-1] ** -0.5, None)
    )
    return {
        "tensors": tensors, "strides": strides, "sizes": sizes, "factors": factors, "parts": parts, "sinks": sinks,
        "buffers": tuple(buffers), "mine": buffers[rank], "epochs": epochs, "fault": fault, "out": out,
        "capacity": capacity, "rank": rank, "timeout_ns": None, **cut.split, **cut.unit, "WORLD": len(buffers),
        "W_PAD": ranks_padded(cut, len(buffers)), "SCATTER": scatter, "SPLIT": True, "PUSH": True, "COLLECT": True,
        "PDL": False,
    } | how  # fmt: skip


def exchange_arguments(partial, *, buffers, rank, epochs, fault, merged, capacity, programs, scatter, **how):
    """All arguments of `exchange_kernel`, by name; `how` may replace any."""
    (*_, H, DV), rows = partial.out.shape, partial.lse.numel()
    UR, UD, ranks = exchange_unit(rows, DV, len(buffers), programs)
    return {
        "out": partial.out, "lse": partial.lse, "buffers": tuple(buffers), "mine": buffers[rank], "epochs": epochs,
        "fault": fault, "merged_out": merged.out, "merged_lse": merged.lse, "rows": rows, "H": H,
        "capacity": capacity, "rank": rank, "timeout_ns": None, "DV": DV, "WORLD": len(buffers), "W_PAD": ranks,
        "UR": UR, "UD": UD, "SCATTER": scatter, "PUSH": True, "COLLECT": True, "PDL": False,
    } | how  # fmt: skip


class Ranks:
    """What the SymmetricLinks of several ranks would keep, all in this process."""

    def __init__(self, size, *, programs=3, rows=48, head_dim=32):
        here = {"device": DEVICE}
        self.size, self.programs, self.rows = size, programs, rows
        self.capacity = rows * (head_dim + -(-head_dim // 16))
        self.buffers = [torch.zeros(2, size, self.capacity, dtype=torch.int64, **here) for _ in range(size)]
        self.epochs = [torch.zeros(1024, dtype=torch.int32, **here) for _ in range(size)]
        self.parts = torch.zeros((programs + rows) * rows * (head_dim + 1), dtype=torch.int64, **here)
        self.fault = torch.zeros(size, dtype=torch.int32, **here)
        self.epoch = 0

    def begin(self):
        """What this epoch reads it must have written: NaN everywhere, but in the slot of the epoch before."""
        self.epoch = self.epoch % LAST_EPOCH + 1
        for buffer in self.buffers:
            buffer[self.epoch % 2] = NAN_PACKET
        self.other = [buffer[1 - self.epoch % 2].clone() for buffer in self.buffers]

    def end(self, packets):
        """Every packet carries the epoch, no other was written, and all programs have counted."""
        for buffer, other in zip(self.buffers, self.other, strict=True):
            assert ((buffer[self.epoch % 2] >> 32) == self.epoch).sum() == packets
            assert torch.equal(buffer[1 - self.epoch % 2], other)
        assert all((epochs == self.epoch).all() for epochs in self.epochs)
        assert (self.fault == 0).all()

    def kept(self, rank):
        keep = {"buffers": self.buffers, "rank": rank, "epochs": self.epochs[rank], "fault": self.fault}
        return keep | {"capacity": self.capacity}

    def decode(self, q, ks, vs, lens=None, sinks=None, scatter=False):
        """q and each rank's keys, values and lengths -> each rank's out."""
        self.begin()
        B, T, H, _ = q.shape
        shape = (B, T, H // self.size if scatter else H, vs[0].shape[3])
        outs = [q.new_full(shape, math.nan) for _ in range(self.size)]
        parts = [torch.full_like(self.parts, NAN_PACKET) for _ in range(self.size)]
        for step in ("SPLIT", "PUSH", "COLLECT"):
            for rank, (k, v) in enumerate(zip(ks, vs, strict=True)):
                length = None if lens is None else lens[rank]
                cut = plan_launch(q, k, v, KeySelection(local_seqlens=length), self.programs, self.size)
                whole = lens is None and k.shape[1] > 0 and k.shape[1] % BN == 0
                powers = all(d == triton.next_power_of_2(d) >= 16 for d in (q.shape[3], v.shape[3]))
                arguments = fused_arguments(
                    q, k, v, length, cut=cut, sinks=sinks, parts=parts[rank], out=outs[rank], scatter=scatter,
                    **self.kept(rank), BN=BN, EVEN=whole and powers, SPLIT=False, PUSH=False, COLLECT=False,
                )  # fmt: skip
                fused_kernel[(cut.programs,)](**arguments | {step: True}, num_warps=cut.warps)
        rows, DV, UD = B * T * H, shape[3], cut.unit["UD"]
        self.end(rows * (DV + -(-DV // UD)) * (1 if scatter else self.size))
        return outs

    def exchange(self, partials, scatter=False):
        """Each rank's Partial -> each rank's merge."""
        self.begin()
        B, T, H, DV = partials[0].out.shape
        shape = (B, T, H // self.size if scatter else H, DV)
        merged = [
            Partial(torch.full(shape, math.nan, device=DEVICE), torch.full(shape[:3], math.nan, device=DEVICE))
            for _ in range(self.size)
        ]
        for step in ("PUSH", "COLLECT"):
            for rank, partial in enumerate(partials):
                arguments = exchange_arguments(
                    partial, merged=merged[rank], programs=self.programs, scatter=scatter, **self.kept(rank),
                    PUSH=False, COLLECT=False,
                )  # fmt: skip
                exchange_kernel[(self.programs,)](**arguments | {step: True})
        UD = arguments["UD"]
        self.end(B * T * H * (DV + -(-DV // UD)) * (1 if scatter else self.size))
        return merged


def seen(lens, S):
    """bool `[B, 1, 1, sum of S]`: which of all ranks' keys there are."""
    return torch.cat([torch.arange(S, device=DEVICE) < length[:, None] for length in lens], 1)[:, None, None]


# shape, keys of the ranks (or their lengths, by rank and row), sinks, scatter; in this order on one set of buffers
STEPS = {
    "even": ({"B": 1, "H": 6, "H_kv": 2, "D": 16}, (32, 48, 16), False, False),
    "ragged": ({"B": 2, "T": 2, "H": 6, "H_kv": 6, "D": 24, "D_v": 8}, ((20, 0), (0, 0), (33, 0)), False, False),
    "sinks": ({"B": 2, "T": 1, "H": 12, "H_kv": 2, "D": 32}, (19, 0, 5), True, False),
    "scatter": ({"B": 2, "T": 1, "H": 6, "H_kv": 2, "D": 16, "D_v": 32}, (17, 3, 40), False, True),
    "ragged scatter with sinks": ({"B": 3, "H": 6, "H_kv": 1, "D": 16}, ((9, 0, 1), (40, 0, 0), (2, 0, 0)), True, True),
    "even again": ({"B": 1, "H": 6, "H_kv": 2, "D": 16}, (32, 48, 16), False, False),
}


def step_of(name, size):
    """(q, ks, vs, lens, sinks, scatter), and what must come of it: exact and in plain PyTorch."""
    shape, held, with_sinks, scatter = STEPS[name]
    held = held[:size]
    ragged = isinstance(held[0], tuple)
    counts = [max(map(max, held))] * size if ragged else held
    q, k, v = peaked_inputs(S=sum(counts), **shape, dtype=torch.float16, device=DEVICE)
    ks, vs = list(k.split(counts, 1)), list(v.split(counts, 1))
    lens, mask = None, None
    if ragged:
        lens = [torch.tensor(row, dtype=torch.int32, device=DEVICE) for row in held]
        mask = seen(lens, counts[0])
        unused = [torch.arange(counts[0], device=DEVICE) >= length[:, None] for length in lens]
        ks, vs = (
            [t.masked_fill(u[..., None, None], math.nan) for t, u in zip(ts, unused, strict=True)] for ts in (ks, vs)
        )
    mask = None if mask is None else mask.expand(-1, -1, q.shape[1], -1)
    exact, plain = oracle(q, k, v, mask=mask), attend(q, k, v, mask=mask, backend=PLAIN)
    sinks = torch.linspace(-2, 4, q.shape[2], device=DEVICE) if with_sinks else None
    if with_sinks:
        exact, plain = (Partial(p.out / (1 + (sinks - p.lse).exp())[..., None], p.lse) for p in (exact, plain))
    return (q, ks, vs, lens, sinks, scatter), exact, plain.out.half()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_fused_steps_between_ranks(size):
    ranks = Ranks(size)
    first = {}
    for name in STEPS:
        arguments, exact, plain = step_of(name, size)
        outs = ranks.decode(*arguments)
        scatter = arguments[-1]
        assert scatter or all(torch.equal(out, outs[0]) for out in outs)
        whole = torch.cat(outs, 2) if scatter else outs[0]
        assert_within_rounding(whole, exact.out, plain)
        assert (whole[exact.lse == -math.inf] == 0).all()
        first[name] = whole
    assert torch.equal(first["even"], first["even again"])  # the same bits, whatever lies in the memory


def test_a_sink_without_weight_where_no_rank_has_a_key():
    (q, ks, vs, _, sinks, _), _, _ = step_of("sinks", 2)
    nothing = [[t[:, :0] for t in ts] for ts in (ks, vs)]
    assert (Ranks(2).decode(q, *nothing, sinks=torch.full_like(sinks, -math.inf))[0] == 0).all()


@pytest.mark.parametrize("programs", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_fused_steps_on_any_number_of_programs(programs):
    for name in ("even", "ragged scatter with sinks"):
        arguments, exact, plain = step_of(name, 2)
        outs = Ranks(2, programs=programs).decode(*arguments)
        assert_within_rounding(torch.cat(outs, 2) if arguments[-1] else outs[0], exact.out, plain)


@pytest.mark.slow
def test_epochs_start_again():
    ranks = Ranks(2)
    ranks.epoch = LAST_EPOCH - 1
    for epochs in ranks.epochs:
        epochs.fill_(LAST_EPOCH - 1)
    arguments, exact, plain = step_of("even", 2)
    for epoch in (LAST_EPOCH, 1, 2):
        outs = ranks.decode(*arguments)
        assert (ranks.epochs[0] == epoch).all()
        assert torch.equal(outs[0], outs[1])
        assert_within_rounding(outs[0], exact.out, plain)


def partials_of(size, shape, *, empty_ranks=(), empty_row=None):
    """Float32 partials whose lse differ much."""
    generator, here = torch.Generator().manual_seed(size), torch.device(DEVICE)
    for rank in range(size):
        out, lse = torch.randn(shape, generator=generator), 20 * torch.randn(shape[:3], generator=generator)
        if empty_row is not None:
            out[empty_row], lse[empty_row] = 0.0, -math.inf
        partial = Partial(out.to(here), lse.to(here))
        yield empty(shape, dtype=torch.float32, device=here) if rank in empty_ranks else partial


EXCHANGES = {  # shape, scatter, which ranks are empty, which row is on all
    "plain": ((2, 2, 6, 16), False, (), None),
    "odd": ((1, 1, 7, 5), False, (0,), None),
    "scatter": ((2, 1, 6, 32), True, (1,), 1),
    "one number": ((1, 1, 1, 1), False, (), None),
    "all empty": ((1, 2, 6, 24), False, (0, 1, 2), None),
    "all empty, scatter": ((1, 1, 6, 8), True, (0, 1, 2), None),
    "plain again": ((2, 2, 6, 16), False, (), None),
}


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_exchange_between_ranks(size):
    ranks = Ranks(size)
    ranks.epoch = LAST_EPOCH - 3  # and on past the end
    for epochs in ranks.epochs:
        epochs.fill_(LAST_EPOCH - 3)
    seen_epochs, bits = [], {}
    for name, (shape, scatter, empty_ranks, row) in EXCHANGES.items():
        partials = list(partials_of(size, shape, empty_ranks=empty_ranks, empty_row=row))
        exact = merge(stack([Partial(p.out.double(), p.lse.double()) for p in partials]))
        results = ranks.exchange(partials, scatter)
        seen_epochs.append(ranks.epochs[0][7].item())
        if scatter:
            results = [Partial(torch.cat([r.out for r in results], 2), torch.cat([r.lse for r in results], 2))]
        for result in results:
            torch.testing.assert_close(result.out.double(), exact.out, atol=2e-6, rtol=0)
            torch.testing.assert_close(result.lse.double(), exact.lse, atol=1e-5, rtol=0)
            assert torch.equal(result.out, results[0].out)
            assert torch.equal(result.lse, results[0].lse)
        bits[name] = results[0]
    assert seen_epochs == [LAST_EPOCH - 2, LAST_EPOCH - 1, LAST_EPOCH, 1, 2, 3, 4]
    assert torch.equal(bits["plain"].out, bits["plain again"].out)


@pytest.mark.parametrize("programs", [1, 2, pytest.param(12, marks=pytest.mark.slow)])
def test_attend_on_any_number_of_programs(monkeypatch, programs):
    """Other cuts of the keys, the same result to rounding; the same cut, the same bits."""
    monkeypatch.setattr(triton_decode, "multiprocessors", lambda device: programs)
    q, k, v = peaked_inputs(B=2, T=2, S=300, H=4, H_kv=2, D=16, dtype=torch.float16, device=DEVICE)
    for how in ({}, {"local_seqlens": torch.tensor([300, 140], device=DEVICE)}):
        one = attend(q, k, v, **how, backend="triton")
        exact, plain = oracle(q, k, v, **how), attend(q, k, v, **how, backend=PLAIN)
        assert_within_rounding(one.out, exact.out, plain.out)
        bound = 1e-4 if DEVICE == "cuda" else 2e-5  # as in attention_cases.py
        torch.testing.assert_close(one.lse.double(), exact.lse, atol=bound, rtol=0)
    again = attend(q, k, v, **how, backend="triton")
    assert torch.equal(one.out, again.out)
    assert torch.equal(one.lse, again.lse)


@pytest.mark.parametrize("keys", [{}, {"window": 9}])
def test_compiled_whole(keys):
    """torch.compile does not break the graph at a kernel. (Lengths on the CPU are looked at, which breaks it.)"""
    q, k, v = peaked_inputs(B=2, S=20, H=4, H_kv=2, D=16, dtype=torch.float16, device=DEVICE)
    if keys:
        positions = {"q_positions": torch.tensor([15], device=DEVICE), "k_positions": torch.arange(20, device=DEVICE)}
        keys = keys | positions

    def step(q, k, v):
        partial = attend(2 * q, k, v, **keys, backend="triton")
        return 2 * partial.out, partial.lse + 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(q, k, v), step(q, k, v), strict=True):
        assert torch.equal(actual, expected)


def test_what_is_fused():
    """A step over a SymmetricLink is one launch where the kernel can run it, and is refused by name elsewhere."""
    link = object.__new__(SymmetricLink)  # what is asked of it needs no device
    link.group, link.rows, link.head_dim, link.device = None, 16, 32, torch.device(DEVICE)
    if DEVICE == "cuda":
        link.device = torch.device("cuda", torch.cuda.current_device())

    def path(algorithm="auto", backend="auto", dtype=torch.float16, how=None, **shape):
        q, k, v = peaked_inputs(**{"B": 2, "H": 8, "H_kv": 2, "D": 32} | shape, dtype=dtype, device=link.device)
        return explain(q, k, v, group=link, backend=backend, algorithm=algorithm, **how or {})

    positions = {"q_positions": torch.arange(1, device=DEVICE), "k_positions": torch.arange(64, device=DEVICE)}
    everything = positions | {"local_seqlens": torch.tensor([1, 2]), "window": 3, "softcap": 30.0}
    everything["mask"] = torch.ones(1, 1, 1, 64, device=DEVICE) > 0
    for algorithm in ("auto", "fused", "fused_scatter"):
        for route in (path(algorithm), path(algorithm, "triton", how=everything)):
            assert route.is_fused
            assert route.backend == "triton"
            assert route.algorithm == ("fused" if algorithm == "auto" else algorithm)
    cannot = {
        "has a link for at most 16 rows B T H and head dim 32, got 24 and 32": {"B": 3},
        "has a link for at most 16 rows B T H and head dim 32, got 16 and 40": {"D": 40},
        "has bfloat16 and float16 only, got torch.float32": {"dtype": torch.float32},
        "needs head dims that are multiples of 8 up to 256, got 20 and 20": {"D": 20},
        "has a kernel of its own, got backend 'reference'": {"backend": "reference"},
        "takes at most 64 query rows per KV head (T H / H_kv), got 68": {"T": 17},
    }
    for text, how in cannot.items():
        route = path(**how)
        assert not route.is_fused
        assert route.algorithm_obstacles["fused"] == text
        for algorithm in ("fused", "fused_scatter"):
            with pytest.raises(Unavailable, match=re.escape(f"algorithm '{algorithm}' {text}: use algorithm='auto'")):
                path(algorithm, **how)
    link.group = type("Two", (), {"rank": lambda self: 0, "size": lambda self: 2})()
    with pytest.raises(InputError, match="fused_scatter needs heads that divide by the ranks, got 7 heads and 2 ranks"):
        path("fused_scatter", H=7, H_kv=1)
    assert path("fused", H=7, H_kv=1).is_fused


TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8",
}  # fmt: skip
SHARED_MEMORY_BYTES = 227 * 1024
STACK_BYTES = 32  # spilled registers; with 64 query rows eight times that


def typed(value, path, constants, attributes):
    """The type that Triton compiles an argument for; notes constants, and what is a multiple of 16."""
    if isinstance(value, tuple):
        return tuple(typed(part, (*path, i), constants, attributes) for i, part in enumerate(value))
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if value is None or isinstance(value, bool) or value == 1:
        constants[path] = value
        return "constexpr"
    if value and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if value < 2**31 else "i64"


def compile_for_hopper(kernel, arguments, **options):
    """What comes of it on sm_90: registers, stack and shared memory in bytes, and its PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, attributes, signature = {}, {}, {}
    for place, param in enumerate(kernel.params):
        if param.is_constexpr:
            constants[(place,)], signature[param.name] = arguments[param.name], "constexpr"
        else:
            signature[param.name] = typed(arguments[param.name], (place,), constants, attributes)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return used | {"shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"]}


def meta_call(dtype="bfloat16", W=2, B=1, T=1, S=4096, H=32, H_kv=8, D=128, D_v=None, keys=(), softcap=None):
    """(q, k, v, KeySelection, plan, the first arguments of `split`) of tensors without memory, for 132 programs."""
    here = {"device": "meta"}
    q, k, v = (
        torch.empty(*shape, dtype=getattr(torch, dtype), **here)
        for shape in ((B, T, H, D), (B, S, H_kv, D), (B, S, H_kv, D_v or D))
    )
    lens, table = torch.empty(B, dtype=torch.int32, **here), torch.empty(B, 64, dtype=torch.int32, **here)
    positions = {"q_positions": torch.empty(B, T, dtype=torch.long, **here)}
    positions["k_positions"] = torch.empty(B, S, dtype=torch.long, **here)
    told = {
        "ragged": {"local_seqlens": lens},
        "ragged queries": {"local_seqlens": torch.empty(B, T, dtype=torch.int32, **here)},
        "paged": {"local_seqlens": lens, "page_table": table},
        "causal": positions,
        "window": {"window": 100},
        "mask": {"mask": torch.empty(B, 1, T, S, dtype=torch.bool, **here)},
    }
    selection = KeySelection(**{name: value for key in keys for name, value in told[key].items()})
    cut = plan_launch(q, k, v, selection, 132, W)
    split = split_arguments(AttentionCall(q, k, v, selection, D**-0.5, softcap))
    return q, k, v, cut, dict(zip(("tensors", "strides", "sizes", "factors"), split, strict=True))


def compile_case(name, case):
    """One of split, merge, fused, exchange, products, for the shape that `case` says."""
    if name == "exchange":
        W = case.get("W", 2)
        out = torch.empty(case.get("B", 1), 1, 32, case.get("D", 128), device="meta")
        partial = Partial(out, out[..., 0])
        buffers = [torch.empty(1, dtype=torch.int64, device="meta")] * W
        counters = torch.empty(1, dtype=torch.int32, device="meta")
        arguments = exchange_arguments(
            partial, buffers=buffers, rank=0, epochs=counters, fault=counters, merged=partial, capacity=1 << 20,
            programs=132, scatter=case.get("scatter", False), timeout_ns=30 * 10**9, PDL=True,
        )  # fmt: skip
        return compile_for_hopper(exchange_kernel, arguments, num_warps=4)
    if name == "products":
        x, q, k = (torch.empty(N, case["K"], dtype=torch.bfloat16, device="meta") for N in (1, 4096, 1024))
        arguments = {"x": x, "weights": (q, k), "sizes": (4096, 1024), "out": torch.empty(5120, device="meta")}
        arguments |= {"K": case["K"], "COUNT": 2, "COLS": COLS}
        return compile_for_hopper(products_kernel, arguments, num_warps=WARPS)
    scatter, sinks = case.pop("scatter", False), case.pop("sinks", False)
    q, k, v, cut, split = meta_call(**case)
    parts = torch.empty(1, dtype=torch.int64, device="meta")
    if name == "split":
        arguments = split | {"parts": parts, **cut.split, "PDL": True}
        return compile_for_hopper(split_kernel, arguments, num_warps=cut.warps)
    if name == "merge":
        out = torch.empty(q.shape, dtype=torch.float32, device="meta")
        arguments = {
            "lens": split["tensors"][3], "parts": parts, "out": out, "lse": out, "sizes": split["sizes"],
            "programs": 132, **cut.merge, **cut.unit, "PDL": True,
        }  # fmt: skip
        return compile_for_hopper(merge_kernel, arguments, num_warps=cut.warps)
    counters = torch.empty(1, dtype=torch.int32, device="meta")
    arguments = fused_arguments(
        q, k, v, None, cut=cut, sinks=torch.empty(32, dtype=torch.float32, device="meta") if sinks else None,
        buffers=[parts] * case.get("W", 2), rank=0, epochs=counters, parts=parts, fault=counters, out=q,
        capacity=1 << 20, scatter=scatter, timeout_ns=30 * 10**9, PDL=True, **split,
    )  # fmt: skip
    return compile_for_hopper(fused_kernel, arguments, num_warps=cut.warps)


FEW = [
    ("fused", {}),
    ("fused", {"W": 8, "B": 4, "H_kv": 4, "keys": ["ragged"]}),
    ("exchange", {}),
    ("split", {"keys": ["ragged"]}),  # B = 1, which Triton makes a constant
    ("split", {"keys": ["paged", "causal"], "B": 2, "T": 2, "D": 64}),
    ("fused", {"keys": ["ragged queries"], "T": 8}),
    ("merge", {"D": 64}),
    ("products", {"K": 4096}),
]
HIDING = (["ragged"], ["paged"], ["causal", "window"], ["mask"])
MANY = [
    *[("fused", {"D": D, "W": W, "dtype": T}) for D in (64, 256) for W in (2, 8) for T in ("bfloat16", "float16")],
    *[("fused", {"D": 192, "D_v": 128, "keys": keys}) for keys in HIDING],
    *[("fused", {"T": T, "H": 32, "H_kv": 2, "D": 128}) for T in (1, 2, 4)],
    ("fused", {"T": 4, "H": 32, "H_kv": 2, "D": 256, "keys": ["paged", "causal", "window", "mask"], "softcap": 30.0}),
    ("fused", {"B": 64, "keys": ["ragged"], "W": 8, "scatter": True, "sinks": True}),
    ("fused", {"B": 256, "keys": ["paged"], "W": 4}),
    *[("exchange", {"W": W, "B": B, "D": D, "scatter": B > 1}) for W in (2, 3, 8) for B in (1, 64) for D in (64, 256)],
    *[("split", {"D": D, "keys": keys}) for D in (64, 128, 256) for keys in ([], ["paged"], ["causal", "mask"])],
    *[("merge", {"D": D, "keys": keys}) for D in (64, 128, 256) for keys in ([], ["ragged"])],
    *[("products", {"K": K}) for K in (7168, 14336, 2047)],
]


def assert_compiles(cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"{cases[len(reports)]}: {run.stderr.splitlines()[-1]}"
    for (name, case), found in zip(cases, reports, strict=True):
        what = f"{name} {case}: {found}"
        assert found["local"] == 0, what
        assert found["stack"] <= STACK_BYTES * (8 if case.get("T") == 4 else 1), what
        assert found["shared"] <= SHARED_MEMORY_BYTES, what
        assert not found["multimem"], what
        assert found["waits"] == (name in ("fused", "exchange")), what
        assert found["past L1"] == (name not in ("merge", "products")), what


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    assert_compiles(FEW)


@pytest.mark.slow
def test_more_kernels_compile_for_hopper():
    with ThreadPoolExecutor(2) as processes:
        list(processes.map(assert_compiles, (MANY[::2], MANY[1::2])))


if __name__ == "__main__":
    for name, case in json.loads(sys.argv[1]):
        found = compile_case(name, case)
        ptx = found.pop("ptx")
        found |= {"waits": "ld.volatile.global.b64" in ptx, "past L1": "st.global.wt" in ptx}
        sys.stdout.write(json.dumps(found | {"multimem": "multimem" in ptx}) + "\n")
        sys.stdout.flush()
