"""What we are measured against computes the same attention, whatever carries it; the ceiling reads every byte."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tree_attention import attend
from tree_attention.bench.peers import LOCAL_PEERS, SPREAD_PEERS, streaming_read
from tree_attention.testing import assert_within_rounding, oracle, peaked_inputs, record_traffic

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE: dict[str, Any] = {"B": 3, "H": 6, "H_kv": 2, "D": 16}
EVEN, UNEVEN = (20, 20, 20), (7, 1, 30)
STEPS = 3  # one buffer serves them all


def layout_of(tensor, layout):
    """The same values, HND in memory if so asked."""
    return tensor if layout == "NHD" else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def spread(group, name, held, layout, dtype):
    """Each step's output on this rank, and the calls of the last one; q changes between the steps, in place."""
    held = held[: group.size()]
    q, k, v = peaked_inputs(S=sum(held), **SHAPE, dtype=dtype)
    k, v = (layout_of(t.split(held, 1)[group.rank()].contiguous(), layout) for t in (k, v))
    step = SPREAD_PEERS[name].prepare(q, k, v, group, local=attend)
    outs, recorded = [], []
    for _ in range(STEPS):
        with record_traffic() as calls:
            outs.append(step().clone())
        recorded.append(calls)
        q.neg_()
    return outs, recorded[-1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("held", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", SPREAD_PEERS)
def test_spread_peers(pool, name, held, layout, ranks):
    dtype = torch.float32
    results = pool.run(spread, name, held, layout, dtype, ranks=ranks)
    q, k, v = peaked_inputs(S=sum(held[:ranks]), **SHAPE, dtype=dtype)
    for turn in range(STEPS):
        exact, plain = oracle(q, k, v).out, attend(q, k, v).out
        for outs, _ in results:
            assert_within_rounding(outs[turn], exact, plain)
            assert torch.equal(outs[turn], results[0][0][turn])
        q = -q


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("three_all_reduce", [("allreduce", 3 * 6 * 4), ("allreduce", 3 * 6 * 16 * 4), ("allreduce", 3 * 6 * 4)]),
        ("all_gather", [("allgather_base", 3 * 6 * 17 * 4)]),
        ("ring", 2 * [("send", 3 * 20 * 2 * 16 * 2)] + 2 * [("recv", 3 * 20 * 2 * 16 * 2)]),
    ],
)
def test_what_travels(pool, name, expected):
    """In bfloat16: the partials go as float32, keys and values as they are, KV heads unrepeated."""
    results = pool.run(spread, name, EVEN, "NHD", torch.bfloat16, ranks=2)
    for _, calls in results:
        assert sorted(calls) == sorted(expected)


@pytest.mark.parametrize("name", LOCAL_PEERS | SPREAD_PEERS)
def test_what_cannot_run_says_so(name):
    assert (LOCAL_PEERS | SPREAD_PEERS)[name].obstacle(*peaked_inputs(dtype=torch.bfloat16))


@pytest.mark.slow
def test_the_read_covers_every_word():
    """Under Triton's interpreter, in a process of its own: it must be on before the kernel is defined."""
    pytest.importorskip("triton")
    code = "from test_peers import read_and_compare; read_and_compare('cpu')"
    here = {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]),
        "TRITON_INTERPRET": "1",
    }
    subprocess.run([sys.executable, "-c", code], env=os.environ | here, check=True)


def read_and_compare(device):
    for words in (1, 127, 128, 129, 1024, 4096, 5001):
        tensor = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device=device)
        for programs in (1, 3, 50):
            sums = streaming_read(tensor, block_bytes=512, programs_per_sm=programs, num_warps=1)()
            assert (sums.sum() - tensor.sum(dtype=torch.int64)) % 2**32 == 0, (words, programs)
    cache = torch.randn(2, 3, 5, 8, device=device).bfloat16()
    sums = streaming_read(cache.transpose(1, 2), block_bytes=512, programs_per_sm=2, num_warps=1)()
    assert (sums.sum() - cache.view(torch.int32).sum(dtype=torch.int64)) % 2**32 == 0


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("stages", [1, 3])
def test_the_read_on_a_gpu(stages):
    read_and_compare("cuda")
    tensor = torch.randint(-(2**31), 2**31, (10_000_019,), dtype=torch.int32, device="cuda")
    sums = streaming_read(tensor, num_stages=stages)()
    assert (sums.sum() - tensor.sum(dtype=torch.int64)) % 2**32 == 0


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("default")  # the packages are not ours
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("name", LOCAL_PEERS)
def test_local_peers(name, B, layout):
    q, k, v = peaked_inputs(B=B, S=2048, H=32, H_kv=8, D=128, dtype=torch.bfloat16, device="cuda")
    exact, plain = oracle(q, k, v).out, attend(q, k, v).out.bfloat16()
    k, v = layout_of(k, layout), layout_of(v, layout)
    obstacle = LOCAL_PEERS[name].obstacle(q, k, v)
    if obstacle:
        pytest.skip(obstacle)
    step = LOCAL_PEERS[name].prepare(q, k, v, None)
    for _ in range(2):
        assert step().shape == q.shape
        assert_within_rounding(step(), exact, plain)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert_within_rounding(out, exact, plain)
