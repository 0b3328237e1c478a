"""`bench decode`: its cases and verdicts on the CPU, its figure, its mistakes; on two GPUs a short run."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import plot
from command import call
from tree_attention import attend, tree_decode
from tree_attention.bench import case as cases
from tree_attention.bench.case import Case, exact_attention, keys_and_values, make_inputs
from tree_attention.bench.decode import Contestant, _try
from tree_attention.bench.peers import LOCAL_PEERS, SPREAD_PEERS
from tree_attention.cli.bench_decode import table_rows
from tree_attention.reduce.collectives import gather
from tree_attention.testing import oracle

SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "layout": "HND", "ragged": False}
SMALL = Case(batch=3, keys=50, heads=6, kv_heads=2, head_dim=16, layout="HND", ragged=False)
HELD = [(keys, batch) for keys in (1, 1000, 16384, 65536, 262144, 1 << 20) for batch in (1, 3, 6)]


@pytest.mark.parametrize(("keys", "batch"), HELD)
@pytest.mark.parametrize("ragged", [False, True])
def test_sets_outlast_caches_and_fit(keys, batch, ragged):
    case = Case(batch, keys, **SHAPE | {"ragged": ragged})
    sets, calls, lengths = case.sets(), case.calls(), case.lengths()
    assert 2 <= sets <= 10
    assert sets == 10 or sets * case.read_bytes() >= 526e6
    assert sets * case.allocated_bytes() <= 60e9
    assert calls % sets == 0
    assert calls >= 2 * sets
    assert calls >= 24 or calls * case.read_bytes() >= 24e9
    assert (lengths is None) == (not ragged)
    if lengths is not None:
        assert torch.equal(lengths, case.lengths())
        assert 1 <= lengths.min() <= lengths.max() <= keys
        assert case.read_bytes() == int(lengths.sum()) * 4096
    else:
        assert case.read_bytes() == case.allocated_bytes() == batch * keys * 4096


def inputs_and_reference(group, case):
    cases.REFERENCE_ELEMENTS = 7 * case.batch * case.kv_heads * case.head_dim
    q, lengths, sets = make_inputs(case, group.rank(), group.size(), torch.device("cpu"))
    k, v = keys_and_values(case, sets[0])
    own, total = exact_attention(q, k, v, lengths, group)
    shared = gather(q, group), gather(k.contiguous(), group), gather(v.contiguous(), group)
    return *(t.float() for t in shared), lengths, own, total, len(sets)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_reference_takes_all_keys(pool, layout, ragged):
    case = dataclasses.replace(SMALL, layout=layout, ragged=ragged)
    for rank, (q, k, v, lengths, own, total, sets) in enumerate(pool.run(inputs_and_reference, case, ranks=2)):
        assert sets == 10
        assert torch.equal(q[0], q[1])
        assert not torch.equal(k[0], k[1])
        alone = oracle(q[0], k[rank], v[rank], local_seqlens=lengths)
        torch.testing.assert_close(own, alone.out)
        held = torch.full((3,), 50) if lengths is None else lengths
        mask = (torch.arange(50) < held[:, None]).tile(1, 2)[:, None, None]
        both = oracle(q[0], torch.cat([*k], 1), torch.cat([*v], 1), mask=mask)
        torch.testing.assert_close(total, both.out)
        other = oracle(q[0], k[1 - rank], v[1 - rank], local_seqlens=lengths)
        unweighted = (alone.out + other.out) / 2  # what the heavy keys are for: this must not pass
        assert (unweighted - total).norm() / total.norm() > 0.1


def verdicts(group):
    q, _, sets = make_inputs(SMALL, group.rank(), group.size(), torch.device("cpu"))
    pairs = [keys_and_values(SMALL, kv) for kv in sets]
    exact = exact_attention(q, *pairs[0], None, group)
    ranks = SimpleNamespace(world=group, link=SimpleNamespace(synchronize=lambda: None))

    def absent(k, v):
        raise RuntimeError("no such kernel\nand more")

    def of_all(k, v):
        return lambda: tree_decode(q, k, v, group=group)

    def own(k, v):
        return lambda: attend(q, k, v).out

    one_rank_nan = math.nan if group.rank() else 1.0
    tried = {
        "ours": Contestant("ours", "ours", of_all),
        "own": Contestant("own", "local", own),
        "twice": Contestant("twice", "spread", lambda k, v: lambda: of_all(k, v)() / 2, output=lambda out: 2 * out),
        "own for all": Contestant("own for all", "spread", own),
        "nan": Contestant("nan", "local", lambda k, v: lambda: attend(q, k, v).out * one_rank_nan),
        "bits": Contestant("bits", "ours", lambda k, v: lambda: of_all(k, v)().float() * (1 + 1e-5 * group.rank())),
        "absent": Contestant("absent", "local", absent if group.rank() else own),
        "obstacle": Contestant("obstacle", "local", absent, obstacle="needs a package"),
    }
    results = {what: _try(contestant, pairs, exact, ranks) for what, contestant in tried.items()}
    return {what: (len(steps), verdict) for what, (steps, verdict) in results.items()}


def test_verdicts(pool):
    """Every rank says the same, and who is wrong or absent anywhere is not timed."""
    here, there = pool.run(verdicts, ranks=2)
    assert here == there
    for what in ("ours", "own", "twice"):
        steps, verdict = here[what]
        assert (steps, verdict["wrong"], verdict["note"]) == (10, False, None)
        assert verdict["peak_extra_bytes"] is None  # the CPU's is not counted
        assert 0 < verdict["relative_error"] < 5e-3
    assert here["ours"][1]["same_bits"] is True
    for what, note in (
        ("own for all", "wrong: relative error"), ("nan", "wrong: relative error inf"), ("bits", "wrong: not the same"),
    ):  # fmt: skip
        steps, verdict = here[what]
        assert (steps, verdict["wrong"]) == (0, True)
        assert verdict["note"].startswith(note)
    for what, note in (("absent", "did not run: no such kernel"), ("obstacle", "needs a package")):
        unknown = {"peak_extra_bytes": None, "relative_error": None, "same_bits": None}
        assert here[what] == (0, unknown | {"wrong": False, "note": note})
    json.dumps(here, allow_nan=False)


def record(what, kind, graph_s, eager_s=None, **others):
    known = SHAPE | {"batch": 1, "keys": 16384, "ranks": 2, "roofline_s": 20e-6, "relative_error": 2e-3, "note": None}
    known |= {"peak_extra_bytes": None}
    return known | {"what": what, "kind": kind, "graph_s": graph_s, "eager_s": eager_s} | others


RECORDS = [
    record("fused", "ours", 25e-6, 60e-6, peak_extra_bytes=16384),
    record("merge", "exchange", 5e-6),
    record("cudnn", "local", 40e-6),
    record("flash2", "local", 24e-6),
    record("flash3", "local", None, relative_error=None, note="needs the package fa3-fwd"),
    record("ring", "spread", None, 300e-6, peak_extra_bytes=268_500_000),
]


def test_table_rows():
    assert table_rows(RECORDS) == [
        ["ours, fused", "25.0", "1.250", "1.042", "60.0", "0.0", "2.0e-03"],
        ["exchange alone: SymmetricLink", "5.0", "-", "-", "-", "-", "2.0e-03"],
        ["cudnn", "40.0", "2.000", "1.667", "-", "-", "2.0e-03"],
        ["flash2", "24.0", "1.200", "1.000", "-", "-", "2.0e-03"],
        ["flash3", "-", "-", "-", "-", "-", "-"],
        ["cudnn + ring", "-", "-", "-", "300.0", "268.5", "2.0e-03"],
    ]
    assert table_rows(RECORDS[:1]) == [["ours, fused", "25.0", "1.250", "-", "60.0", "0.0", "2.0e-03"]]


def lines(*keys):
    clocks = ("graph_s", "eager_s", "roofline_s")
    scaled = [
        each | {"keys": held} | {clock: each[clock] and each[clock] * held / 16384 for clock in clocks}
        for held in keys
        for each in RECORDS
    ]
    odd = [record("fused", "ours", 1.0, ragged=True), record("fused", "ours", 1.0, batch=8)]
    return [json.dumps(each | {"gpus": ["GPU A", "GPU A"]}) for each in (odd[0], *scaled, odd[1])]


def test_what_is_drawn():
    shape, times_s = plot.read(lines(16384, 65536))
    assert shape == {"batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "layout": "HND", "ranks": 2}
    assert times_s == {
        "fused": {16384: 25e-6, 65536: 100e-6}, "fastest local peer": {16384: 24e-6, 65536: 96e-6},
        "ring": {16384: 300e-6, 65536: 1200e-6}, "roofline": {16384: 20e-6, 65536: 80e-6},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_figure(tmp_path, kind):
    pytest.importorskip("matplotlib")
    (tmp_path / "records.jsonl").write_text("\n".join(lines(16384, 65536, 1 << 20)))
    plot.main([str(tmp_path / "records.jsonl"), str(tmp_path / f"out.{kind}")])
    assert (tmp_path / f"out.{kind}").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--keys", "0"],
            "keys, batch, heads, kv-heads and head-dim must be at least 1, heads a multiple of kv-heads, ",
        ),
        (
            ["--heads", 30],
            "keys, batch, heads, kv-heads and head-dim must be at least 1, heads a multiple of kv-heads, ",
        ),
        (["--batch", "1;2"], "batch must be a number such as 131072, 128k, 1M or 1e6, got '1;2'"),
        (["--keys", "64,"], "keys must be a number such as 131072, 128k, 1M or 1e6, got ''"),
        (["--layout", "HDN"], "layout must be NHD or HND, got 'HDN'"),
        (
            ["--peers", "cudnn,flash9"],
            f"peers must be all, none or some of {', '.join(LOCAL_PEERS | SPREAD_PEERS)}, got 'flash9'",
        ),
        (["--rounds", 0], "nproc and rounds must be at least 1, got 2 and 0"),
        (["--nproc", 0], "nproc and rounds must be at least 1, got 0 and 15"),
        (["--batch", 8], "two sets of K and V must take at most 60 GB, got 69 GB"),
    ],
)
def test_mistakes(capfd, monkeypatch, options, text):
    code, out, err = call(capfd, monkeypatch, "bench", "decode", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"tree-attention: {text}")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpus(capfd, monkeypatch):
    code, _, err = call(capfd, monkeypatch, "bench", "decode", "--peers", "none")
    found = "bench decode needs a CUDA device per rank, got 2 ranks and 0 devices"
    assert (code, err) == (2, f"tree-attention: {found}\n")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", [["--layout", "NHD"], ["--ragged", "--batch", "3"]])
def test_a_short_run(tmp_path, options):
    output = tmp_path / "records.jsonl"
    here = [sys.executable, "-c", "from tree_attention.cli import main; main()"]  # installed or not
    command = [*here, "bench", "decode", "--keys", "1024,4000", "--rounds", "2", "--output", output, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout.splitlines()[-1])
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [document["surroundings"] | each for each in document["records"]]
    assert [each["keys"] for each in written] == sorted((each["keys"] for each in written), reverse=True)
    assert {each["what"] for each in written} >= {"fused", "apart", "fused_alone", "attend"}
    for each in written:
        assert not each["wrong"], each
        assert each["roofline_s"] > 0
        if each["kind"] in ("ours", "alone"):
            assert each["graph_s"] > 0
            assert each["eager_s"] > 0
    fused, ring = ({each["keys"]: each for each in written if each["what"] == what} for what in ("fused", "ring"))
    assert len(ring) == (0 if "--ragged" in options else 2)
    for keys, record in ring.items():  # each rank makes room for shards that are not its own
        assert record["peak_extra_bytes"] - fused[keys]["peak_extra_bytes"] >= record["bytes"]
