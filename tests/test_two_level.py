"""Inside the node, across, inside again: right, the same bits everywhere, and each level's bytes as stated."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import hosts
from architectures import one_process, sharded, tiny
from tree_attention import (
    InputError,
    Layout,
    Partial,
    RanksDisagree,
    SharedMemoryLink,
    SymmetricLink,
    TreeAttentionError,
    TwoLevel,
    attend,
    merge,
    tree_decode,
    tree_reduce,
)
from tree_attention.hf import TreeCache
from tree_attention.partial import empty, stack
from tree_attention.reduce import choose_algorithm, level_bytes, received_bytes
from tree_attention.reduce.collectives import all_gather
from tree_attention.reduce.two_level import Seat, found_nodes
from tree_attention.testing import RankPool, assert_within_rounding, oracle, peaked_inputs, record_traffic

EVEN, INTERLEAVED, UNEVEN = ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2), (3,))
NODES_OF_4 = (
    EVEN, INTERLEAVED, UNEVEN, ((0,), (1, 2, 3)), ((0, 3), (1,), (2,)), ((0,), (1,), (2,), (3,)), ((0, 1, 2, 3),)
)  # fmt: skip
SHAPE = (1, 3, 5, 6)  # 15 rows: no number of slices but 3 divides them


def random_partial(rank, *, shape=SHAPE, is_empty=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    if is_empty:
        return empty(shape, dtype=dtype, device=torch.device("cpu"))
    out, lse = (torch.randn(*dims, generator=generator, dtype=dtype) for dims in (shape, shape[:-1]))
    return Partial(out, 20 * lse)


@contextmanager
def with_link(group, nodes, kind, **how):
    """A TwoLevel, with a link over each node if a kind of it is named: then the group must be all ranks of the pool."""
    if kind is None:
        yield TwoLevel(group, nodes)
        return
    over, _ = dist.new_subgroups_by_enumeration([list(node) for node in nodes])
    yield TwoLevel(group, nodes, link=kind(over, **how))
    dist.destroy_process_group(over)


def reduce_here(group, nodes, kind, cases):
    with with_link(group, nodes, kind) as topology:
        return [
            tree_reduce(random_partial(group.rank(), shape=shape, is_empty=group.rank() in empty_ranks), topology)
            for shape, empty_ranks in cases
        ]


CASES = [
    (shape, empty_ranks)
    for shape in (SHAPE, (2, 1, 8, 16), (1, 1, 1, 4))
    for empty_ranks in ((), (0,), (1, 2), (0, 1, 2, 3))
]


def assert_equals_merge(pool, ranks, nodes, kind, cases=CASES):
    results = pool.run(reduce_here, nodes, kind, cases, ranks=ranks)
    for i, (shape, empty_ranks) in enumerate(cases):
        parts = [random_partial(r, shape=shape, is_empty=r in empty_ranks) for r in range(ranks)]
        exact = merge(stack([Partial(part.out.double(), part.lse.double()) for part in parts]))
        for result in (of_rank[i] for of_rank in results):
            torch.testing.assert_close(result.out.double(), exact.out, atol=2e-6, rtol=0)
            torch.testing.assert_close(result.lse.double(), exact.lse, atol=1e-5, rtol=0)
            assert torch.equal(result.out, results[0][i].out)
            assert torch.equal(result.lse, results[0][i].lse)
            assert not result.out.isnan().any()


@pytest.mark.parametrize("nodes", NODES_OF_4)
@pytest.mark.parametrize("kind", [None, SharedMemoryLink])
def test_equals_merge_on_every_rank(pool, nodes, kind):
    assert_equals_merge(pool, 4, nodes, kind)


@pytest.mark.parametrize("nodes", [((0, 1), (2,)), ((0,), (1, 2)), ((0,), (1,), (2,))])
def test_three_ranks(pool, nodes):
    assert_equals_merge(pool, 3, nodes, None)


@pytest.mark.slow
def test_seven_and_eight_ranks():
    pool = RankPool(8)
    try:
        assert_equals_merge(pool, 7, ((0, 1, 2, 3), (4, 5), (6,)), None)
        for kind in (None, SharedMemoryLink):
            assert_equals_merge(pool, 8, ((0, 1, 2, 3), (4, 5, 6, 7)), kind)
            assert_equals_merge(pool, 8, ((0, 3, 5), (1, 4), (2, 6, 7)), kind)
    finally:
        pool.close()


def in_float64(group):
    partials = [random_partial(rank, dtype=torch.float64) for rank in range(4)]
    exact = merge(stack(partials))
    close = []
    for kind in (None, SharedMemoryLink):
        with with_link(group, EVEN, kind) as topology:
            result = tree_reduce(partials[group.rank()], topology)
        close.append(torch.allclose(result.out, exact.out, rtol=0, atol=1e-14))
    return close


def test_float64(pool):
    assert pool.run(in_float64) == [[True, True]] * 4


class Peers(TorchDispatchMode):
    """Bytes received from each rank, and anything that is not a send or receive, by name."""

    def __init__(self):
        super().__init__()
        self.received, self.messages, self.others = Counter(), Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "c10d::recv_":
            self.received[args[2]] += sum(tensor.nbytes for tensor in args[0])
            self.messages[args[2]] += 1
        elif name.startswith("c10d::") and name != "c10d::send":
            self.others.append(name)
        return func(*args, **(kwargs or {}))


def peers_here(group, nodes):
    topology = TwoLevel(group, nodes)
    with Peers() as seen:
        tree_reduce(random_partial(group.rank()), topology)
    inside = {rank: nbytes for rank, nbytes in seen.received.items() if rank in topology.peers}
    across = {rank: nbytes for rank, nbytes in seen.received.items() if rank not in topology.peers}
    return inside, across, dict(seen.messages), seen.others


@pytest.mark.parametrize("nodes", [nodes for nodes in NODES_OF_4 if len(nodes) > 1])
def test_messages_and_bytes_of_each_level_are_a_contract(pool, nodes):
    """A rank hears of its own slice twice inside its node, and across only from the holders of that slice."""
    slices = min(map(len, nodes))
    piece = -(-15 // slices) * 7 * 4
    results = pool.run(peers_here, nodes)
    for rank, (inside, across, messages, others) in enumerate(results):
        [node] = [node for node in nodes if rank in node]
        place = node.index(rank)
        holds = place < slices
        assert others == []
        assert across == ({n[place]: piece for n in nodes if n != node} if holds else {})
        expected = {peer: piece * (holds + (i < slices)) for i, peer in enumerate(node) if peer != rank}
        assert inside == {peer: nbytes for peer, nbytes in expected.items() if nbytes}
        assert sum(messages.values()) * piece == sum(inside.values()) + sum(across.values())
    sizes = [len(node) for node in nodes]
    stated = level_bytes(rows=15, head_dim=6, node_sizes=sizes)
    assert (max(sum(i.values()) for i, *_ in results), max(sum(a.values()) for _, a, *_ in results)) == stated
    total = received_bytes("two_level", rows=15, head_dim=6, world_size=4, node_sizes=sizes)
    assert total == max(sum(inside.values()) + sum(across.values()) for inside, across, *_ in results)


def calls_here(group, nodes, kind):
    with with_link(group, nodes, kind) as topology, record_traffic() as calls:
        tree_reduce(random_partial(group.rank()), topology, algorithm="two_level")
    return [call.name for call in calls]


def test_with_a_link_only_the_slices_travel_otherwise(pool):
    assert pool.run(calls_here, EVEN, SharedMemoryLink) == [["send", "recv"]] * 4
    assert pool.run(calls_here, UNEVEN, SharedMemoryLink) == [["send", "recv"], [], [], ["send", "recv"]]


def test_one_node_is_no_level(pool):
    assert pool.run(calls_here, ((0, 1, 2, 3),), SharedMemoryLink) == [[]] * 4
    assert pool.run(calls_here, ((0, 1),), None, ranks=2) == [["send", "recv"]] * 2  # tree, which is auto's


def on_one_host(group):
    topology = TwoLevel(group)
    return topology.nodes, topology.peers, topology.slices


def test_the_ranks_of_one_host_are_one_node(pool):
    assert pool.run(on_one_host, ranks=3) == [(((0, 1, 2),), (0, 1, 2), 3)] * 3


def test_one_process_without_a_group():
    topology = TwoLevel()
    assert topology.nodes == ((0,),)
    partial = random_partial(0)
    assert torch.equal(tree_reduce(partial, topology, algorithm="two_level").out, partial.out)


def seats(*described):
    return [Seat(rank, host, device, reach, None) for rank, (host, device, reach) in enumerate(described)]


def test_nodes_are_hosts_and_gpus_that_reach_each_other():
    assert found_nodes(seats(*[(host, "", None) for host in "abab"])) == ((0, 2), (1, 3))
    islands = [("h", name, tuple("ab" if name in "ab" else "cd")) for name in "acbd"]
    assert found_nodes(seats(*islands)) == ((0, 2), (1, 3))
    assert found_nodes(seats(*[("h", name, None) for name in "abcd"])) == ((0, 1, 2, 3),)  # each sees its own GPU only
    assert found_nodes(seats(("g", "a", ("a", "b")), ("h", "b", ("a", "b")))) == ((0,), (1,))


class Stand(SymmetricLink):
    """A SymmetricLink without GPUs: the merge over ranks, and of scatter the rank's own heads, by gloo."""

    def __init__(self, group):
        self.group = group
        self.scattered = []

    def obstacle(self, spec):
        return None

    def reduce(self, partial, *, scatter=False):
        self.scattered.append(scatter)
        whole = all_gather(partial, self.group)
        if not scatter:
            return whole
        own = slice(*(partial.lse.shape[2] // self.group.size() * (self.group.rank() + i) for i in (0, 1)))
        return Partial(whole.out[:, :, own], whole.lse[:, :, own])


def over_a_stand(group, nodes):
    with with_link(group, nodes, Stand) as topology:
        result = tree_reduce(random_partial(group.rank()), topology)
    plain = tree_reduce(random_partial(group.rank()), TwoLevel(group, nodes))
    return torch.equal(result.out, plain.out), torch.equal(result.lse, plain.lse), topology.link.scattered


@pytest.mark.parametrize(("nodes", "scattered"), [(EVEN, [True] * 4), (UNEVEN, [False] * 3 + [True])])
def test_what_is_asked_of_a_symmetric_link(pool, nodes, scattered):
    """The same bits as without it; each rank is sent its own slice only where every rank of the node has one."""
    assert pool.run(over_a_stand, nodes) == [(True, True, [scatters, False]) for scatters in scattered]


def too_small(group):
    with with_link(group, EVEN, SharedMemoryLink, capacity_bytes=64) as topology, record_traffic() as calls:
        result = tree_reduce(random_partial(group.rank()), topology)
    same = torch.equal(result.out, tree_reduce(random_partial(group.rank()), TwoLevel(group, EVEN)).out)
    return same, Counter(call.name for call in calls)


def test_a_partial_too_large_for_the_link_goes_without(pool):
    assert pool.run(too_small) == [(True, {"send": 3, "recv": 3})] * 4


def decode_here(group, nodes, dtype, verify):
    q, k, v = peaked_inputs(B=2, S=50, H=12, H_kv=3, D=24, D_v=16, dtype=dtype)
    slots = Layout(group.size(), 4).slots(0, 50, group.rank())
    sinks = torch.linspace(-2, 4, 12)
    return tree_decode(q, k[:, slots], v[:, slots], group=TwoLevel(group, nodes), sinks=sinks, verify=verify)


@pytest.mark.parametrize("nodes", [EVEN, UNEVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tree_decode(pool, nodes, dtype):
    q, k, v = peaked_inputs(B=2, S=50, H=12, H_kv=3, D=24, D_v=16, dtype=dtype)
    exact, plain = oracle(q, k, v), attend(q, k, v, backend="cpu_flash")
    sink = torch.linspace(-2, 4, 12).double().exp()
    exact, plain = (p.out.double() * (1 / (1 + sink / p.lse.double().exp())).unsqueeze(-1) for p in (exact, plain))
    results = pool.run(decode_here, nodes, dtype, True) + pool.run(decode_here, nodes, dtype, False)
    for result in results:
        assert torch.equal(result, results[0])
        assert_within_rounding(result, exact, plain.to(dtype))


def flat_by_name(group):
    topology = TwoLevel(group, EVEN)
    mine = random_partial(group.rank())
    with record_traffic() as calls:
        whole = tree_reduce(mine, topology, algorithm="all_gather")
    return torch.equal(whole.out, all_gather(mine, group).out), [call.name for call in calls]


def test_a_flat_algorithm_by_name_takes_the_whole_group(pool):
    assert pool.run(flat_by_name) == [(True, ["allgather_base"])] * 4


def refused(group, by_rank):
    """What is said on each rank; all of them say something, or the test would hang."""
    try:
        TwoLevel(group, by_rank[group.rank() % len(by_rank)])
    except TreeAttentionError as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("by_rank", "kind", "text"),
    [
        ([[[0, 1], [2]]], InputError, "each of the ranks 0 to 3 once, none may be empty, got [[0, 1], [2]]"),
        ([[[0, 1], [1, 2, 3]]], InputError, "each of the ranks 0 to 3 once"),
        ([[[0, 1], [2, 3, 4]]], InputError, "each of the ranks 0 to 3 once"),
        ([[[0, 1, 2, 3], []]], InputError, "none may be empty"),
        ([3], InputError, "nodes of 3 ranks need a number of ranks that divides by it, got 4"),
        ([0], InputError, "nodes of 0 ranks"),
        ([2, [[0], [1, 2, 3]]], RanksDisagree, "nodes must be the same on every rank, got rank 0: 2, rank 1: [[0]"),
        ([2, None], RanksDisagree, "nodes must be the same on every rank"),
    ],
)
def test_nodes_that_contradict_the_group(pool, by_rank, kind, text):
    for said in pool.run(refused, by_rank):
        assert said[0] is kind
        assert text in said[1]


def refused_links(group):
    said = []
    over, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    pair = SharedMemoryLink(over)
    for nodes, link in ((UNEVEN, pair), (INTERLEAVED, pair), (None, pair), (EVEN, pair if group.rank() else None)):
        try:
            TwoLevel(group, nodes, link=link)
        except TreeAttentionError as error:
            said.append((type(error), str(error)))
    dist.destroy_process_group(over)
    return said


def test_links_that_are_not_over_the_node(pool):
    for said in pool.run(refused_links):
        over = "a link must be over the ranks of its node, got one over [0, 1] on rank 0 of the node"
        assert said[:3] == [
            (InputError, f"{over} {node}: make it over a group of those, or give nodes")
            for node in ([0, 1, 2], [0, 2], [0, 1, 2, 3])
        ]
        assert said[3][0] is RanksDisagree
        assert "link must be the same on every rank, got rank 0: NoneType, rank 1: SharedMemoryLink" in said[3][1]


def without_nodes(group):
    said = []
    for over in (group, SharedMemoryLink(group)):
        try:
            tree_reduce(random_partial(0), over, algorithm="two_level")
        except InputError as error:
            said.append(str(error))
    return said


def test_two_level_needs_a_topology(pool):
    needs = "two_level needs a TwoLevel as the group, got"
    assert pool.run(without_nodes, ranks=2) == [[f"{needs} ProcessGroup", f"{needs} SharedMemoryLink"]] * 2


def test_what_auto_chooses_and_its_bytes():
    assert choose_algorithm("cuda", 16, nodes=2) == "two_level"
    assert choose_algorithm("cpu", 4, linked=True, nodes=1) == "shared_memory"
    how = {"rows": 512, "head_dim": 128, "world_size": 8}
    assert level_bytes(rows=512, head_dim=128, node_sizes=(4, 4)) == (6 * 128 * 129 * 4, 128 * 129 * 4)
    assert received_bytes("auto", **how, node_sizes=(4, 4)) == 7 * 128 * 129 * 4
    assert received_bytes("two_level", **how, node_sizes=(8,)) == received_bytes("tree", **how)


def generate_over(group, nodes, static):
    topology = TwoLevel(group, nodes)
    found = sharded(topology, "llama", True, "parallel", static)
    cache = TreeCache(tiny("llama", "tree_attention").config, topology)
    cache.exchange.reduce(random_partial(group.rank()))
    return *found, cache.received_bytes


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_over_two_levels(pool, static):
    tokens, logits = one_process("llama", True)
    results = pool.run(generate_over, UNEVEN, static)
    for its_tokens, its_logits, received in results:
        assert torch.equal(its_tokens, tokens)
        assert torch.equal(its_logits, results[0][1])
        torch.testing.assert_close(its_logits, logits, atol=2e-5 * float(logits.abs().max()), rtol=0)
        assert received == sum(level_bytes(rows=15, head_dim=6, node_sizes=(3, 1)))


@pytest.mark.slow
def test_on_several_hosts():
    """Network namespaces, 1 ms and 100 Mbit/s apart: nodes found by host name, bytes read from the hosts' devices."""
    if (missing := hosts.obstacle()) is not None:
        pytest.skip(f"hosts cannot be emulated here: {missing}")
    program = Path(hosts.__file__).with_name("two_level.py")
    options = ["--ranks", "3,1", "--steps", "2", "--warm-up", "0", "--batch", "8"]
    command = [sys.executable, str(program), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["nodes"] == [[0, 1, 2], [3]]
    assert [its["same_bits"] for its in record["contestants"].values()] == [True] * 5
    assert max(its["max_error"] for its in record["contestants"].values()) < 2e-6
    partial_bytes = 8 * 32 * 129 * 4
    for name, its in record["contestants"].items():
        if name.startswith("two_level"):  # one partial, and headers, acknowledgements, a share of the barriers
            assert partial_bytes < its["cross_host_bytes"] < 1.15 * partial_bytes
    assert record["contestants"]["all_gather"]["cross_host_bytes"] > 3 * partial_bytes


@pytest.mark.slow
def test_the_command_on_several_hosts(tmp_path):
    """`generate` under torchrun's variables, 2 hosts of 2 ranks: one process's tokens, and two levels' bytes."""
    if (missing := hosts.obstacle()) is not None:
        pytest.skip(f"hosts cannot be emulated here: {missing}")
    config = tiny("llama", "tree_attention").config
    config.save_pretrained(tmp_path)
    command = [
        sys.executable, "-c", "from tree_attention.cli import main; main()", "generate", "--random-weights", "--config",
        str(tmp_path / "config.json"), "--max-prompt-tokens", "100", "--max-new-tokens", "4", "--verify", "--json",
    ]  # fmt: skip
    with hosts.emulated_hosts(2, delay_s=1e-4, rate_bit_per_s=1e9) as two:
        outputs = hosts.run_ranks(two, [2, 2], command, env={"TORCHELASTIC_RUN_ID": "none"})
    figures = json.loads(outputs[0].splitlines()[-1])
    assert figures["verify"]["identical"]
    each = {"rows": config.num_attention_heads, "head_dim": config.head_dim}
    layer_bytes = sum(level_bytes(**each, node_sizes=(2, 2)))
    assert figures["received_bytes_per_token"] == config.num_hidden_layers * layer_bytes
    assert layer_bytes < received_bytes("auto", **each, world_size=4)


def on_gpus(rank, size, meeting):
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=meeting, rank=rank, world_size=size)
    half = size // 2
    over, _ = dist.new_subgroups_by_enumeration([list(range(half)), list(range(half, size))])
    topologies = [TwoLevel(nodes=half), TwoLevel(nodes=[range(1), range(1, size)])]
    if half > 1:
        topologies.append(TwoLevel(nodes=half, link=SymmetricLink(over, rows=64, head_dim=16)))
    for shape in (SHAPE, (2, 1, 8, 16), (1, 1, 1, 4)):
        parts = [random_partial(r, shape=shape, is_empty=r == 1) for r in range(size)]
        exact = merge(stack([Partial(part.out.double(), part.lse.double()) for part in parts]))
        for topology in topologies:
            result = tree_reduce(Partial(parts[rank].out.cuda(), parts[rank].lse.cuda()), topology)
            torch.testing.assert_close(result.out.double().cpu(), exact.out, atol=2e-6, rtol=0)
            everywhere = [torch.empty_like(result.out) for _ in range(size)]
            dist.all_gather(everywhere, result.out.contiguous())
            assert all(torch.equal(out, everywhere[0]) for out in everywhere)
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_between_gpus(tmp_path, size):
    """NCCL between pretended nodes; inside them NCCL, and with four GPUs a SymmetricLink, too."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    torch.multiprocessing.spawn(on_gpus, (size, f"file://{tmp_path}/meeting"), nprocs=size)
