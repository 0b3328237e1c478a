"""What a call decides before its first kernel: `explain` says it, `tree_decode` does it, nothing is computed twice."""

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

from tree_attention import (
    AssumedRanks,
    InputError,
    SharedMemoryLink,
    SymmetricLink,
    TwoLevel,
    Unavailable,
    Unsupported,
    attend,
    explain,
    fused_kernels,
    tree_decode,
    tree_reduce,
)
from tree_attention.local import BACKENDS, run_backend
from tree_attention.reduce import ALGORITHMS, choose_algorithm, link_obstacle, received_bytes
from tree_attention.reduce.symmetric import KernelState
from tree_attention.route import DECODE_ALGORITHMS
from tree_attention.testing import peaked_inputs, record_traffic

NOT_ON_CPU, NOT_IN_FLOAT32 = "runs on CUDA tensors, got cpu", "has bfloat16 and float16 only, got torch.float32"
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter: a host without CUDA")


def shapes(device="cpu"):
    """q, k of one number each."""
    one = torch.empty(1, device=device)
    return one.expand(1, 1, 32, 128), one.expand(1, 4096, 8, 128)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_are_enough(device):
    q, k = shapes(device)
    route = explain(q, k, k)
    assert route.backend == ("cpu_flash" if device == "cpu" else "reference")
    assert (route.rank, route.world_size, route.group, route.link) == (0, 1, None, None)
    assert route.received_bytes == 0
    assert not route.is_fused
    assert not route.scatters


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(("link", "sizes"), [(None, ()), (SharedMemoryLink, ()), (SymmetricLink, ()), (TwoLevel, (1,))])
def test_ranks_that_do_not_exist(ranks, link, sizes):
    q, k = shapes()
    sizes = (*sizes, ranks - 1) if sizes else ()
    route = explain(q, k, k, group=AssumedRanks(ranks, link, sizes))
    expected = "tree" if link is None else link.algorithms[0]
    assert (route.rank, route.world_size, route.algorithm) == (0, ranks, expected)
    assert route.received_bytes == received_bytes(expected, rows=32, head_dim=128, world_size=ranks, node_sizes=sizes)
    assert set(route.backend_obstacles) == set(BACKENDS) - {"cpu_flash", "reference"}
    provided = () if link is None else link.algorithms
    for name in DECODE_ALGORITHMS:
        needs = ALGORITHMS[name].link if name in ALGORITHMS else SymmetricLink
        obstacle = route.algorithm_obstacles.get(name)
        if name in ("reduce_scatter", "symmetric_scatter", "fused_scatter") and ranks == 3:
            assert obstacle == "needs heads that divide by the ranks, got 32 heads and 3 ranks"
        elif needs is None or name in provided:
            assert obstacle is None
        elif name in ("fused", "fused_scatter") and link is SymmetricLink:
            assert obstacle == (NOT_ON_CPU if torch.cuda.is_available() else NOT_IN_FLOAT32)
        else:
            assert obstacle == f"needs a {needs.__name__} as the group, got AssumedRanks"


def test_auto_and_choose_algorithm_agree():
    q, k = shapes()
    for ranks in (1, 2, 5):
        assert explain(q, k, k, group=AssumedRanks(ranks)).algorithm == choose_algorithm("cpu", ranks)
    route = explain(q, k, k, group=AssumedRanks(4, SharedMemoryLink))
    assert route.algorithm == choose_algorithm("cpu", 4, linked=True)
    assert explain(q, k, k, group=AssumedRanks(4, TwoLevel, (2, 2))).algorithm == choose_algorithm("cpu", 4, nodes=2)


def test_assumed_ranks_only_answer():
    q, k, v = peaked_inputs()
    for call in (
        lambda group: tree_decode(q, k, v, group=group),
        lambda group: tree_reduce(attend(q, k, v), group),
    ):
        for group in (AssumedRanks(2), AssumedRanks(2, SharedMemoryLink)):
            with pytest.raises(Unsupported, match="pass a group or a link of ranks that exist"):
                call(group)
    with pytest.raises(InputError, match="world_size must be at least 1"):
        AssumedRanks(0)
    with pytest.raises(InputError, match="and the sum of node_sizes"):
        AssumedRanks(4, TwoLevel, (2, 3))


def test_a_route_says_it_all_in_print():
    q, k = shapes()
    text = str(explain(q, k, k, group=AssumedRanks(8, SharedMemoryLink)))
    for part in ("0 of 8", "cpu_flash", "shared_memory", "231.2 kB", "all heads", "fused: needs a SymmetricLink as"):
        assert part in text
    assert "0 of 8, process group" in str(explain(q, k, k, group=AssumedRanks(8)))
    assert "0 of 1, no exchange" in str(explain(q, k, k))


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({"algorithm": "ring"}, InputError, "algorithm must be 'auto' or one of fused, fused_scatter, all_gather, "),
        ({"backend": "flash"}, InputError, "backend must be 'auto' or one of "),
        ({"backend": "cudnn"}, Unavailable, "backend 'cudnn' runs on CUDA tensors, got cpu: use backend='auto'"),
        ({"algorithm": "fused"}, InputError, "fused needs a SymmetricLink as the group, got NoneType"),
        ({"sinks": torch.zeros(3)}, InputError, r"sinks must be \[8\] on cpu, got \[3\] on cpu"),
        ({"window": 0}, InputError, "window must be at least 1"),
        ({"group": AssumedRanks(3), "algorithm": "reduce_scatter"}, InputError, "needs heads that divide by the ranks"),
    ],
)
def test_explain_refuses_what_decoding_refuses(how, error, text):
    q, k, v = peaked_inputs()
    with pytest.raises(error, match=text):
        explain(q, k, v, **how)
    if "group" not in how:
        with pytest.raises(error, match=text):
            tree_decode(q, k, v, **how)


def with_links(group):
    """Routes over links that exist; whether a partial that is too large goes another way; what explaining sends."""
    q, k, v = peaked_inputs(H=12, H_kv=3)
    link, small = SharedMemoryLink(group), SharedMemoryLink(group, capacity_bytes=64)
    one_node, nodes = TwoLevel(group, group.size(), link=link), TwoLevel(group, 1)
    with record_traffic() as calls:
        routes = [explain(q, k, v, group=over) for over in (group, link, small, one_node, nodes)]
    return [(r.rank, r.world_size, r.algorithm, r.received_bytes) for r in routes], (
        routes[2].algorithm_obstacles["shared_memory"],
        routes[3].link is link,
        [call.name for call in calls],
    )


def test_routes_over_groups_and_links(pool):
    how = {"rows": 2 * 12, "head_dim": 32, "world_size": 3}
    for rank, (routes, (obstacle, is_inner, calls)) in enumerate(pool.run(with_links, ranks=3)):
        names = ("tree", "shared_memory", "tree", "shared_memory", "two_level")
        sizes = {"two_level": (1, 1, 1)}
        assert routes == [
            (rank, 3, name, received_bytes(name, **how, node_sizes=sizes.get(name, ()))) for name in names
        ]
        assert obstacle == "needs a CPU partial of at most 64 bytes (capacity_bytes), got 3168 on cpu"
        assert is_inner
        assert calls == []


def vote_only(group):
    """How often the backend runs in a step that is verified, and in one that is not."""
    q, k, v = peaked_inputs()
    counts = []
    for verify in (True, False):
        with mock.patch("tree_attention.decode.run_backend", wraps=run_backend) as spy:
            tree_decode(q, k, v, group=group, verify=verify)
        counts.append(spy.call_count)
    return counts


def test_verify_computes_nothing(pool):
    assert pool.run(vote_only, ranks=2) == [[1, 1]] * 2


def test_each_backend_is_asked_at_most_once():
    q, k, v = peaked_inputs(dtype=torch.float16)
    for backend in ("auto", "reference", "cpu_flash"):
        counted = {name: replace(kept, obstacle=mock.Mock(wraps=kept.obstacle)) for name, kept in BACKENDS.items()}
        with mock.patch.dict(BACKENDS, counted):
            tree_decode(q, k, v, backend=backend)
        assert max(kept.obstacle.call_count for kept in counted.values()) == 1


@pytest.mark.parametrize("sinks", [None, torch.zeros(8)])
def test_a_step_compiles_whole(sinks):
    """Resolving a route leaves no break in the graph."""
    q, k, v = peaked_inputs(T=2, S=20)
    how = {"q_positions": torch.tensor([15, 16]), "k_positions": torch.arange(20), "window": 9, "sinks": sinks}

    def step(q, k, v):
        return 2 * tree_decode(2 * q, k, v, **how)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), step(q, k, v))


def test_asking_for_a_link_changes_nothing(monkeypatch):
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert link_obstacle() in (None, "needs CUDA")
    assert "TORCH_SYMM_MEM_DISABLE_MULTICAST" not in os.environ
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0")
    assert "needs NVLink multicast off" in link_obstacle()


class WritesOnes:
    """Takes the place of a kernel: launched on any grid, it fills the argument at `place`."""

    def __init__(self, place):
        self.place = place

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **constants):
        arguments[self.place].fill_(1.0)


@INTERPRETED
def test_a_fused_step_compiles_whole(monkeypatch):
    """Over a link without GPUs: from the link's private state to the launch nothing breaks the graph."""
    link = object.__new__(SymmetricLink)
    link.group, link.rank, link.world_size, link.rows, link.head_dim = None, 0, 1, 64, 64
    link.device = torch.device("cpu")
    packets, counters = torch.zeros(8, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    link._kernel_state = KernelState([packets], counters, packets.clone(), counters.clone(), [4, 0, 3, 1, 10**9])
    monkeypatch.setattr(fused_kernels, "fused_kernel", WritesOnes(10))
    q, k, v = peaked_inputs(S=20, H=4, H_kv=2, D=16, dtype=torch.float16)
    how = {"mask": torch.ones(1, 1, 1, 20) > 0, "sinks": torch.zeros(4), "softcap": 3.0}
    assert explain(q, k, v, group=link, **how).is_fused

    def step(q, k, v):
        return 2 * tree_decode(2 * q, k, v, group=link, **how)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert step(q, k, v).eq(2).all()
    assert compiled(q, k, v).eq(2).all()
