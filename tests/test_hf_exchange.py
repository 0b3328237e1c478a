"""The exchange between the ranks of a cache: its links, and that the bytes it counts are those received."""

import math
from unittest import mock

import pytest
import torch

from architectures import (
    BLOCK,
    GREEDY,
    HEADS,
    NEW_TOKENS,
    RESULTS_OF_A_STEP,
    ROWS,
    TOKENS,
    one_process,
    prompt,
    tiny,
)
from tree_attention.errors import Unavailable
from tree_attention.hf import TreeCache, exchange, prefill
from tree_attention.reduce import SharedMemoryLink
from tree_attention.testing import record_traffic


def traffic(group, name, reading, way):
    """Return bytes and calls of reading; bytes, calls and bytes put into shared memory of `generate`; the tokens."""
    ids, mask = prompt(False)
    model = tiny(name, "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    if way == "tree":  # as on several hosts
        cache.exchange.link = None
    elif way == "both":  # the prompt is too much for the memory, a step is not
        cache.exchange.link.capacity_bytes = 1000
    with record_traffic() as reads:
        if reading == "parallel":
            prefill(model, ids, cache, chunk_tokens=24)
    read_bytes = cache.received_bytes
    spy = mock.patch.object(SharedMemoryLink, "gather", autospec=True, side_effect=SharedMemoryLink.gather)
    with spy as shared, record_traffic() as writes:
        out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    handed = [call.args[1].nbytes for call in shared.call_args_list]
    return read_bytes, reads, cache.received_bytes - read_bytes, writes, handed, out.sequences


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"), [*((name, "shared memory") for name in RESULTS_OF_A_STEP), ("gemma2", "tree"), ("llama", "both")]
)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_exchange_for_each_sharded_layer_and_step(pool, name, ranks, way):
    layers, width = RESULTS_OF_A_STEP[name]
    of_token = ROWS * HEADS * width * 4
    steps = [TOKENS, *[1] * (NEW_TOKENS - 1)]  # the prompt is one step
    shared = {"shared memory": steps, "tree": [], "both": steps[1:]}[way]
    tree = steps[: len(steps) - len(shared)]
    rounds = math.ceil(math.log2(ranks))
    results = pool.run(traffic, name, "replicated", way, ranks=ranks)
    received_by_tree = []
    for read_bytes, reads, received, calls, handed, tokens in results:
        assert (read_bytes, reads) == (0, [])
        assert handed == [of_token * step for step in shared for _ in range(layers)]
        assert received == layers * of_token * (rounds * sum(tree) + 2 * (ranks - 1) * sum(shared))
        assert {call.name for call in calls} == ({"send", "recv"} if tree else set())
        received_by_tree.append([call.bytes for call in calls if call.name == "recv"])
        assert torch.equal(tokens, one_process(name, False)[0])
    for rank in {2: range(2), 3: range(1), 4: range(4)}[ranks]:  # the busiest
        assert received_by_tree[rank] == [of_token * step for step in tree for _ in range(layers * rounds)]
    assert max(map(len, received_by_tree)) == rounds * layers * len(tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "H_kv", "D", "D_v", "windows"),
    [("llama", 2, 16, 16, 0), ("gemma2", 2, 16, 16, 2), ("deepseek_v3", 4, 24, 12, 0)],
)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_of_parallel_prefill(pool, name, H_kv, D, D_v, windows, ranks):
    layers, share = RESULTS_OF_A_STEP[name][0], (ranks - 1) / ranks
    stops = {2: (24, 48, 56), 3: (24, 48, 60), 4: (16, 32, 48)}[ranks]
    expected_bytes, expected_calls = 0, []
    for start, stop in zip((0, *stops), stops, strict=False):
        keys = stop * H_kv * (D + D_v) * 4
        queries = (stop - start) * HEADS * (D * 4 + (D_v + 1) * 4)
        window = (stop - start) * H_kv * (D + D_v) * 4
        expected_bytes += share * ROWS * (layers * min(keys, queries) + windows * window)
        by_keys = ["allgather_base"] * (2 if start else 1)  # the chunk's own, and those before it
        a_layer = by_keys if keys <= queries else ["allgather_base", "alltoall_base"]
        expected_calls += [*["allgather_base"] * windows, *a_layer * layers]
    for received, calls, *_ in pool.run(traffic, name, "parallel", "shared memory", ranks=ranks):
        assert sorted(call.name for call in calls) == sorted(expected_calls)
        seen = {"allgather_base": ranks - 1, "alltoall_base": share}  # what is received for a byte that is handed over
        assert received == pytest.approx(sum(seen[call.name] * call.bytes for call in calls))
        assert received == pytest.approx(expected_bytes)


def received(group, max_tokens):
    ids, mask = prompt(padded=False)
    model = tiny("gemma2", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    return cache.received_bytes


def test_a_static_cache_counts_what_it_receives(pool):
    dynamic, static = (pool.run(received, max_tokens, ranks=2) for max_tokens in (None, 80))
    assert static == dynamic
    assert static[0] > 0


class FakeLink:
    """Replaces SymmetricLink, which needs GPUs; test_gpu.py has real ones."""

    limit = 100

    def __init__(self, group, *, rows, head_dim, timeout_s):
        if rows > self.limit:
            raise Unavailable("too many rows")
        self.rows, self.head_dim = rows, head_dim

    def obstacle(self, spec):
        return None if spec.rows() <= self.rows and spec.shape[3] <= self.head_dim else "too small"


def links_of_steps(group, steps):
    """Return for each step (rows, tokens) whether it makes a link on GPUs, and that link's rows and head dim.

    The group has gloo, like many groups of GPUs, so the cache starts with a link for CPU tensors.
    """
    made = []
    with mock.patch.object(exchange, "SymmetricLink", FakeLink):
        cache = TreeCache(tiny("deepseek_v3", "tree_attention").config, group, max_tokens=40)
        assert isinstance(cache.exchange.link, SharedMemoryLink)
        for rows, tokens in steps:
            is_new = cache.exchange.link_for_steps(rows, tokens, torch.device("cuda"))
            link = cache.exchange.link
            made.append((is_new, getattr(link, "rows", None), getattr(link, "head_dim", None)))
    return made


def test_steps_on_gpus_make_a_link_that_holds_them(pool):
    """The first one has room for the largest step of one row."""
    expected = [(True, 64, 12), (False, 64, 12), (False, 64, 12), (True, 72, 12), (False, 72, 12)]
    assert pool.run(links_of_steps, [(1, 1), (1, 16), (3, 5), (9, 2), (18, 1)], ranks=2) == [expected] * 2
    assert (
        pool.run(links_of_steps, [(99, 1), (1, 1)], ranks=2) == [[(False, None, None)] * 2] * 2
    )  # unavailable: asked once


def steps_with_links(batches):
    """Return the batch sizes for which the steps of one cache ask for a link, and the tokens."""
    model, asked, written = tiny("llama", "tree_attention"), [], []
    cache = TreeCache(model.config, max_tokens=TOKENS + NEW_TOKENS)
    with mock.patch.object(cache.exchange, "link_for_steps", side_effect=lambda rows, *_: asked.append(rows)):
        for batch in batches:
            cache.reset()
            ids = prompt(False)[0][:batch]
            written.append(model.generate(ids, cache=cache, **GREEDY).sequences)
    return asked, written


def test_a_cache_asks_for_a_link_when_the_batch_changes():
    """It asks before the first step of each `generate`, and in no later step."""
    asked, written = steps_with_links([1, 2])
    assert asked == [1, 2]
    tokens = one_process("llama", False)[0]
    assert torch.equal(written[0], tokens[:1])
    assert torch.equal(written[1], tokens)


def counted_and_received_by_larger_steps(group):
    """The link holds steps of one row; after `reset` there are two. Return bytes counted and bytes received."""
    ids, model = prompt(padded=False)[0], tiny("llama", "tree_attention")
    layers, width = RESULTS_OF_A_STEP["llama"]
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=TOKENS + NEW_TOKENS)
    cache.exchange.link.capacity_bytes = HEADS * width * 4
    spy = mock.patch.object(SharedMemoryLink, "gather", autospec=True, side_effect=SharedMemoryLink.gather)
    with spy as shared, record_traffic() as calls:
        for batch in (1, 2):
            cache.reset()
            model.generate(ids[:batch], cache=cache, **GREEDY)
    through_link = sum(2 * call.args[1].nbytes for call in shared.call_args_list)  # each 4 bytes come with an epoch
    assert len(shared.call_args_list) == layers * (NEW_TOKENS - 1)  # the steps of one row
    return cache.received_bytes, through_link + sum(call.bytes for call in calls if call.name == "recv")


def test_steps_that_do_not_fit_the_link_are_counted_as_they_ran(pool):
    for counted, received in pool.run(counted_and_received_by_larger_steps, ranks=2):
        assert counted == received


def counted_and_received(group, max_tokens, capacity_bytes):
    """Return the bytes that the cache counted, and the bytes of the `recv` calls that ran."""
    ids, mask = prompt(padded=False)
    model = tiny("llama", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    cache.exchange.link.capacity_bytes = capacity_bytes
    with record_traffic() as calls:
        model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    return cache.received_bytes, sum(call.bytes for call in calls if call.name == "recv")


@pytest.mark.parametrize("max_tokens", [None, TOKENS + NEW_TOKENS])
def test_a_link_too_small_for_the_partial_is_not_counted(pool, max_tokens):
    """The partial of every forward pass is larger than the link, so everything goes through gloo."""
    for counted, received in pool.run(counted_and_received, max_tokens, 100, ranks=2):
        assert counted == received > 0
