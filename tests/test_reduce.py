"""The reduction across real processes: right, bit for bit the same on every rank, and as many bytes as stated."""

import math
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tree_attention import (
    InputError,
    Layout,
    Partial,
    RanksDisagree,
    SymmetricLink,
    TreeAttentionError,
    TwoLevel,
    Unavailable,
    Unsupported,
    attend,
    merge,
    tree_decode,
    tree_reduce,
)
from tree_attention.partial import empty, stack
from tree_attention.reduce import ALGORITHMS, SharedMemoryLink, choose_algorithm, received_bytes, shared_memory
from tree_attention.testing import assert_within_rounding, oracle, peaked_inputs, record_traffic

EVERYWHERE = ("all_gather", "all_reduce", "tree", "shared_memory", "two_level")  # every rank gets the whole
ON_GPUS = ("symmetric", "symmetric_scatter")  # tests/test_triton.py and tests/test_gpu.py run these
B, T, H, D_V = 2, 3, 12, 16


def random_partial(rank, *, is_empty=False):
    generator = torch.Generator().manual_seed(rank)
    if is_empty:
        return empty((B, T, H, D_V), dtype=torch.float32, device=torch.device("cpu"))
    out, lse = (torch.randn(*shape, generator=generator) for shape in ((B, T, H, D_V), (B, H, T)))
    return Partial(out, 20 * lse.transpose(1, 2))  # in memory as `attend` leaves it, and `empty` does not


def linked(group, algorithm):
    """The group, or what the algorithm needs in its place: two_level gets the first half of the ranks as a node."""
    if algorithm == "shared_memory":
        return SharedMemoryLink(group)
    ranks = range(group.size())
    nodes = [node for node in (ranks[: (len(ranks) + 1) // 2], ranks[(len(ranks) + 1) // 2 :]) if node]
    return TwoLevel(group, nodes) if algorithm == "two_level" else group


def reduce_here(group, algorithm, empty_ranks):
    mine = random_partial(group.rank(), is_empty=group.rank() in empty_ranks)
    group = linked(group, algorithm)
    with record_traffic() as calls:
        result = tree_reduce(mine, group, algorithm=algorithm)
    return result, calls


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in ON_GPUS])
@pytest.mark.parametrize("empty_ranks", [(), (0,), (1, 2), (0, 1, 2, 3)])
def test_equals_merge_on_every_rank(pool, ranks, algorithm, empty_ranks):
    exact = merge(
        stack([Partial(*(x.double() for x in random_partial(r, is_empty=r in empty_ranks))) for r in range(ranks)])
    )
    results = [result for result, _ in pool.run(reduce_here, algorithm, empty_ranks, ranks=ranks)]
    if algorithm == "reduce_scatter":
        results = [Partial(torch.cat([r.out for r in results], 2), torch.cat([r.lse for r in results], 2))]
    for result in results:
        torch.testing.assert_close(result.out.double(), exact.out, atol=2e-6, rtol=0)
        torch.testing.assert_close(result.lse.double(), exact.lse, atol=1e-5, rtol=0)
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.lse, results[0].lse)
        assert not result.out.isnan().any()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives_and_bytes_are_a_contract(pool, ranks):
    packed, lse, out = B * T * H * (D_V + 1) * 4, B * T * H * 4, B * T * H * D_V * 4
    expected = {
        "all_gather": [("allgather_base", packed)],
        "all_reduce": [("allreduce", lse), ("allreduce", out), ("allreduce", lse)],
        "reduce_scatter": [("alltoall_base", packed)],
        "shared_memory": [],
    }
    for algorithm, calls in expected.items():
        for _, made in pool.run(reduce_here, algorithm, (), ranks=ranks):
            assert [tuple(call) for call in made] == calls
    received = [
        sum(call.bytes for call in made if call.name == "recv")
        for _, made in pool.run(reduce_here, "tree", (), ranks=ranks)
    ]
    assert max(received) == math.ceil(math.log2(ranks)) * packed


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_stated_bytes(ranks):
    rows, packed = B * T * H, B * T * H * (D_V + 1) * 4
    stated = {name: received_bytes(name, rows=rows, head_dim=D_V, world_size=ranks) for name in ALGORITHMS}
    assert stated == {
        "all_gather": (ranks - 1) * packed,
        "all_reduce": pytest.approx(2 * (ranks - 1) / ranks * rows * (D_V + 2) * 4),  # paper, equations 12-14
        "tree": math.ceil(math.log2(ranks)) * packed,
        "reduce_scatter": pytest.approx((ranks - 1) / ranks * packed),
        "shared_memory": 2 * (ranks - 1) * packed,
        "symmetric": 2 * (ranks - 1) * packed,
        "symmetric_scatter": pytest.approx(2 * (ranks - 1) / ranks * packed),
        "two_level": math.ceil(math.log2(ranks)) * packed,  # of one node: what "auto" takes
    }
    auto = received_bytes("auto", rows=rows, head_dim=D_V, world_size=ranks, device_type="cuda")
    assert auto == stated["all_gather"]


def decode_here(group, algorithm, dtype, block, seqlens):
    rank, size = group.rank(), group.size()
    q, k, v = peaked_inputs(B=2, T=1, S=50, H=12, H_kv=3, D=24, D_v=16, dtype=dtype)
    layout = Layout(size, block)
    slots = layout.slots(0, 50, rank)
    local = layout.local_length(torch.tensor(seqlens), rank)
    k, v = k[:, slots].clone(), v[:, slots].clone()
    for row, length in enumerate(local):
        k[row, length:], v[row, length:] = math.nan, math.nan
    sinks = torch.linspace(-2, 4, 12)
    group = linked(group, algorithm)
    return tree_decode(q, k, v, group=group, local_seqlens=local, sinks=sinks, softcap=None, algorithm=algorithm)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "seqlens"), [(1, (50, 7)), (8, (49, 3)), (64, (50, 0))])
def test_tree_decode_with_ragged_rows_and_sinks(pool, ranks, dtype, block, seqlens):
    q, k, v = peaked_inputs(B=2, T=1, S=50, H=12, H_kv=3, D=24, D_v=16, dtype=dtype)
    sinks = torch.linspace(-2, 4, 12)
    mask = (torch.arange(50) < torch.tensor(seqlens)[:, None])[:, None, None, :]
    exact = with_sinks_by_hand(oracle(q, k, v, mask=mask), sinks)
    plain = with_sinks_by_hand(attend(q, k, v, mask=mask, backend="cpu_flash"), sinks).to(dtype)
    for algorithm in EVERYWHERE:
        results = pool.run(decode_here, algorithm, dtype, block, seqlens, ranks=ranks)
        for result in results:
            assert result.dtype == dtype
            assert torch.equal(result, results[0])
            assert_within_rounding(result, exact, plain)
    scattered = pool.run(decode_here, "reduce_scatter", dtype, block, seqlens, ranks=ranks)
    assert_within_rounding(torch.cat(scattered, 2), exact, plain)


def with_sinks_by_hand(partial, sinks):
    weight = partial.lse.double().exp()
    return partial.out.double() * (weight / (weight + sinks.double().exp())).unsqueeze(-1)


def over_mesh(group):
    partial = random_partial(group.rank())
    expected = tree_reduce(partial, group)
    mesh = DeviceMesh.from_group(group, "cpu")
    return torch.equal(tree_reduce(partial, mesh).out, expected.out)


def test_device_mesh(pool):
    assert pool.run(over_mesh, ranks=3) == [True] * 3


def outside_the_group(group):
    half = dist.new_group([0])
    texts = []
    for call in (tree_reduce, lambda partial, group: tree_decode(*peaked_inputs(), group=group)):
        try:
            call(random_partial(0), half)
        except InputError as error:
            texts.append(str(error))
    return texts


def test_a_group_this_rank_is_not_in(pool):
    inside, outside = pool.run(outside_the_group, ranks=4)[:2]
    assert inside == []
    assert outside == ["this rank (1) is not in the group: only its members may call"] * 2


def test_unknown_algorithm_lists_the_known():
    with pytest.raises(InputError, match="symmetric, symmetric_scatter, two_level, got 'ring'"):
        tree_reduce(random_partial(0), algorithm="ring")


def scatter_odd_heads(group):
    partial = random_partial(0)
    try:
        tree_reduce(Partial(partial.out[:, :, :5], partial.lse[:, :, :5]), group, algorithm="reduce_scatter")
    except InputError as error:
        return str(error)


def test_reduce_scatter_needs_heads_that_divide(pool):
    text = "reduce_scatter needs heads that divide by the ranks, got 5 heads and 2 ranks"
    assert pool.run(scatter_odd_heads, ranks=2) == [text] * 2


def without_a_symmetric_link(group):
    """What is said where there is none: of the group itself, and of a link of the other kind."""
    texts = []
    q, k, v = peaked_inputs(H=12, H_kv=3)
    for over in (group, SharedMemoryLink(group)):
        for algorithm in ON_GPUS:
            try:
                tree_reduce(random_partial(0), over, algorithm=algorithm)
            except InputError as error:
                texts.append(str(error))
        for algorithm in ("symmetric", "fused", "fused_scatter"):
            for verify in (False, True):
                try:
                    tree_decode(q, k, v, group=over, algorithm=algorithm, verify=verify)
                except TreeAttentionError as error:
                    texts.append(str(error))
    return texts


def test_symmetric_and_fused_need_a_symmetric_link(pool):
    for texts in pool.run(without_a_symmetric_link, ranks=2):
        expected = []
        for kind in ("ProcessGroup", "SharedMemoryLink"):
            needs = f"needs a SymmetricLink as the group, got {kind}"
            expected += [f"{algorithm} {needs}" for algorithm in ON_GPUS]
            for algorithm in ("symmetric", "fused", "fused_scatter"):
                text = f"{algorithm} {needs}"
                expected += [text, f"rank 0: {text}; rank 1: {text}"]
        assert texts == expected


def test_fused_without_a_group_needs_a_link():
    with pytest.raises(InputError, match="fused needs a SymmetricLink as the group, got NoneType"):
        tree_decode(*peaked_inputs(), algorithm="fused")


def without_cuda(group):
    bad = [{"rows": 0}, {"head_dim": 0}, {"timeout_s": 0.0}, {"programs": 0}]
    texts = []
    for how in ({}, *bad):
        try:
            SymmetricLink(group, **how)
        except (Unavailable, InputError) as error:
            texts.append((type(error).__name__, str(error)))
    return texts


def of_other_sizes(group):
    with pytest.raises(RanksDisagree, match="rows must be the same on every rank, got rank 0: 10, rank 1: 11"):
        SymmetricLink(group, rows=10 + group.rank())


def test_a_symmetric_link_is_of_one_size(pool):
    pool.run(of_other_sizes, ranks=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA devices")
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_symmetric_link_needs_cuda(pool, ranks):
    """On every rank alike, and before that its arguments are looked at."""
    for (kind, text), *others in pool.run(without_cuda, ranks=ranks):
        assert kind == "Unavailable"
        assert text.startswith("a SymmetricLink is unavailable: ")
        assert all(f"rank {rank} needs CUDA" in text for rank in range(ranks))
        assert [kind for kind, _ in others] == ["InputError"] * 4
        assert all("must be positive, got" in text for _, text in others)


def disagree(group, what):
    q, k, v = peaked_inputs(H=8, H_kv=2)
    how = {}
    if group.rank() == 1:
        match what:
            case "shape":
                q = q[:, :, :4]
            case "dtype":
                q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
            case "algorithm":
                how["algorithm"] = "all_gather"
            case "own fault":
                how["local_seqlens"] = torch.tensor([-1, 3])
            case "dims":
                k = k[0, 0, 0]
            case "a fault of another kind":
                how["sinks"] = [0.0] * 8
            case "gradient":
                k.requires_grad_()
    group = SharedMemoryLink(group) if what == "link" else group
    if what == "link" and group.group.rank() == 1:
        group = group.group
    try:
        tree_decode(q, k, v, group=group, verify=True, **how)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "shape",
            "q must be the same on every rank, got rank 0: [2, 1, 8, 32] torch.float32 cpu, rank 1: [2, 1, 4, 32]",
        ),
        ("dtype", "rank 1: [2, 1, 8, 32] torch.bfloat16"),
        ("algorithm", "algorithm must be the same on every rank, got rank 0: auto, rank 1: all_gather, rank 2: auto"),
        ("own fault", "rank 1: local_seqlens must be between 0 and S_local = 64, got -1 to 3"),
        ("dims", "rank 1: k must be 4-D [B, tokens, heads, head_dim], got (32,)"),
        ("a fault of another kind", "rank 1: AttributeError: 'list' object has no attribute 'shape'"),
        ("gradient", "rank 1: the exchange between ranks has no gradient: call it under torch.no_grad()"),
        ("link", "link must be the same on every rank, got rank 0: SharedMemoryLink, rank 1: None, rank 2: Shared"),
        (None, None),
    ],
)
def test_verify_raises_on_every_rank_alike(pool, what, text):
    for said in pool.run(disagree, what, ranks=3):
        assert (said is None) if text is None else (text in said)


def ask_for_a_gradient(group):
    q, k, v = peaked_inputs()
    keys = 0 if group.rank() else k.shape[1]
    try:
        tree_decode(q.requires_grad_(), k[:, :keys], v[:, :keys], group=group)
    except Unsupported as error:
        return str(error)


def test_a_gradient_is_refused_on_a_rank_without_keys_too(pool):
    assert (
        pool.run(ask_for_a_gradient, ranks=2)
        == ["the exchange between ranks has no gradient: call it under torch.no_grad()"] * 2
    )


def nothing_to_reduce(group):
    link, no_rows = SharedMemoryLink(group), Partial(torch.zeros(0, 1, 2, 8), torch.zeros(0, 1, 2))
    with pytest.raises(
        RanksDisagree, match="capacity_bytes must be the same on every rank, got rank 0: 64, rank 1: 72"
    ):
        SharedMemoryLink(group, capacity_bytes=64 + 8 * group.rank())
    return tree_reduce(no_rows, link).out.shape


def test_shared_memory_is_of_one_size_and_takes_no_rows(pool):
    assert pool.run(nothing_to_reduce, ranks=2) == [(0, 1, 2, 8)] * 2


def without_room(group):
    with (
        mock.patch.object(tempfile, "mkstemp", wraps=tempfile.mkstemp) as mkstemp,
        mock.patch.object(os, "unlink", wraps=os.unlink) as unlink,
        pytest.raises(Unavailable, match="no folder for shared memory can be written to, or has room: see /dev/shm"),
    ):
        SharedMemoryLink(group, capacity_bytes=1 << 46)
    return mkstemp.call_count - unlink.call_count


def test_shared_memory_without_room_is_unavailable_on_every_rank(pool):
    assert pool.run(without_room, ranks=2) == [0, 0]


def hammer(group, steps):
    """Many gathers of changing size, the ranks never in step; returns the wrong ones, and the files left behind."""
    before = set(Path("/dev/shm").glob("tree-attention-*"))
    link = SharedMemoryLink(group)
    sizes = torch.randint(1, 3000, (steps,), generator=torch.Generator().manual_seed(0)).tolist()
    naps = torch.rand(steps, generator=torch.Generator().manual_seed(group.rank())).tolist()
    wrong = []
    for step, size in enumerate(sizes):
        if naps[step] > 0.98:
            time.sleep(0.03 * naps[step])
        gathered = link.gather(torch.full((size,), float(step * 10 + group.rank())))
        expected = torch.tensor([float(step * 10 + rank) for rank in range(group.size())])
        if not torch.equal(gathered, expected[:, None].expand(-1, size)):
            wrong.append(step)
    left = set(Path("/dev/shm").glob("tree-attention-*")) - before  # only now: the others may be ahead of its unlinking
    return wrong, left


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shared_memory_over_many_steps(pool, ranks):
    assert pool.run(hammer, 1000, ranks=ranks) == [([], set())] * ranks


def late(group):
    link = SharedMemoryLink(group)
    shared_memory.TIMEOUT_S = 0.2
    if group.rank() == 2:
        return None
    try:
        link.gather(torch.ones(3))
    except TreeAttentionError as error:
        return str(error)
    finally:
        shared_memory.TIMEOUT_S = 600.0


def test_shared_memory_names_the_rank_that_does_not_arrive(pool):
    assert pool.run(late, ranks=3)[:2] == ["ranks [2] did not arrive within 0 s"] * 2


def not_fitting(group):
    texts = []
    for over in (group, SharedMemoryLink(group, capacity_bytes=1 << 10)):
        try:
            tree_reduce(random_partial(0), over, algorithm="shared_memory")
        except InputError as error:
            texts.append(str(error))
    whole = tree_reduce(random_partial(0), over)  # "auto" takes what fits
    return texts, torch.equal(whole.out, tree_reduce(random_partial(0), group).out)


def test_shared_memory_needs_a_link_that_is_large_enough(pool):
    for texts, auto_is_right in pool.run(not_fitting, ranks=2):
        assert texts[0] == "shared_memory needs a SharedMemoryLink as the group, got ProcessGroup"
        assert "at most 1024 bytes (capacity_bytes), got 4896 on cpu" in texts[1]
        assert auto_is_right


def test_what_auto_chooses():
    assert choose_algorithm("cuda", 8) == "all_gather"
    assert choose_algorithm("cpu", 3) == "tree"
    assert choose_algorithm("cpu", 3, linked=True) == "shared_memory"
    assert choose_algorithm("cuda", 2, linked=True) == "symmetric"
