"""transformers with a cache that is spread over ranks: one process's tokens, equal bits everywhere, bytes as stated."""

import copy
import functools
import itertools
import math
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from architectures import ARCHITECTURES, BLOCK, GREEDY, NEW_TOKENS, TOKENS, one_process, prompt, readings, sharded, tiny
from tree_attention import InputError, RanksDisagree, TreeAttentionError, Unsupported
from tree_attention.hf import TreeCache, can_prefill, chunk, placement, prefill
from tree_attention.hf.state import undone_on_error
from tree_attention.layout import Layout
from tree_attention.reduce import SharedMemoryLink
from tree_attention.testing import record_traffic

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
# Relative to the largest logit. Measured over all architectures, ranks and ways of reading: at most 7.4e-7; a rank that
# is left out, or merged with a wrong weight, gives 1e-2 and more.
TOLERANCE = 2e-5
# sharded layers, D_v + 1
RESULTS_OF_A_STEP = {"llama": (4, 17), "gemma2": (2, 17), "deepseek_v3": (4, 13), "qwen3_next": (2, 17)}
ROWS, HEADS = 2, 4

one_process = functools.cache(one_process)


def assert_like_one_process(results, tokens, logits):
    """results: (tokens, logits) of each rank."""
    assert torch.isfinite(logits).all()
    for its_tokens, its_logits in results:
        assert torch.equal(its_tokens, tokens)
        assert torch.equal(its_logits, results[0][1])
    assert (results[0][1] - logits).abs().max() <= TOLERANCE * logits.abs().max()


@pytest.mark.parametrize("reading", ["replicated", "parallel"])
@pytest.mark.parametrize("static", [False, True])
def test_llama_on_two_ranks(pool, reading, static):
    assert_like_one_process(pool.run(sharded, "llama", False, reading, static, ranks=2), *one_process("llama", False))


def every_reading(group, name, static):
    return {
        (pad, reading): sharded(group, name, pad, reading, static)
        for pad in (False, True)
        for reading in readings(name)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "static"), [(2, False), (3, False), (4, False), (3, True)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_way_of_reading(pool, name, ranks, static):
    results = pool.run(every_reading, name, static, ranks=ranks)
    for padded, reading in results[0]:
        of_ranks = [result[padded, reading] for result in results]
        assert_like_one_process(of_ranks, *one_process(name, padded))


def with_pass(group, name, which):
    """Parallel prefill with one of the passes, or what choose_pass says (None); and what it said."""
    said, choose = [], chunk.choose_pass

    def spy(*args):
        said.append(which or choose(*args))
        return said[-1]

    with mock.patch.object(chunk, "choose_pass", spy):
        return *sharded(group, name, True, "parallel"), said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("which", ["kv", "q", None])
def test_keys_or_queries_travel(pool, name, which):
    results = pool.run(with_pass, name, which, ranks=3)
    assert_like_one_process([result[:2] for result in results], *one_process(name, True))
    for *_, said in results:
        assert said == results[0][2]
        assert set(said) == ({"kv", "q"} if which is None else {which})


@pytest.mark.parametrize(
    ("dtype", "H", "H_kv", "D", "D_v", "C", "even"),
    [
        (torch.float32, 4, 2, 16, 16, 16, 33),  # 33 keys x 2 x 32 x 4 bytes = 16 queries x 4 x (16 x 4 + 17 x 4) bytes
        (torch.bfloat16, 8, 2, 6, 7, 13, 88),  # 88 x 2 x 13 x 2 = 13 x 8 x (6 x 2 + 8 x 4)
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_choose_pass_at_its_boundary(dtype, H, H_kv, D, D_v, C, even, ranks):
    q = torch.empty(1, C // ranks, H, D, dtype=dtype)
    k, v = (torch.empty(1, even // ranks, H_kv, width, dtype=dtype) for width in (D, D_v))
    assert [chunk.choose_pass(q, k, v, (stop - C, stop)) for stop in (C, even, even + 1)] == ["kv", "kv", "q"]


def what_is_held(group, name, reserved):
    """Of each layer the keys this rank holds, and what is allocated."""
    ids, mask = prompt(False)
    model = tiny(name, "tree_attention" if group else "eager")
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    if reserved:
        cache.reserve(TOKENS + NEW_TOKENS - 1)
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    held = [layer.keys[:, :, : getattr(layer, "held", None)] for layer in cache.layers if hasattr(layer, "keys")]
    return held, cache.kv_bytes if group else [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_holds_its_tokens_only(pool, name, ranks):
    whole, layer_bytes = what_is_held(None, name, False)
    results = pool.run(what_is_held, name, True, ranks=ranks)
    tokens = TOKENS + NEW_TOKENS - 1  # the last one was not fed
    sharded_layers = RESULTS_OF_A_STEP[name][0]
    for rank, (held, _) in enumerate(results):
        slots = Layout(ranks, BLOCK).slots(0, tokens, rank)
        for mine, all_of_it in zip(held, whole, strict=True):
            expected = all_of_it[:, :, slots] if all_of_it.shape[2] == tokens else all_of_it
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)

    windows = sum(size for size, keys in zip(layer_bytes, whole, strict=True) if keys.shape[2] < tokens)
    full = sum(layer_bytes) - windows
    assert sum(size for _, size in results) == full + ranks * windows
    a_token = full / tokens / sharded_layers
    grown = sum(size for _, size in pool.run(what_is_held, name, False, ranks=ranks))
    assert 0 <= grown - full - ranks * windows <= ranks * sharded_layers * 64 * a_token


STEPS = [5000, 1, 3, 7000, *[1] * 300]


def grow(group):
    """Bytes allocated after each step."""
    config, taken = tiny("llama", "tree_attention").config, []
    config.num_hidden_layers = 1
    cache = TreeCache(config, group, block_tokens=BLOCK)
    for step in STEPS:
        cache.update(torch.zeros(1, 2, step, 16), torch.zeros(1, 2, step, 16), 0)
        taken.append(cache.kv_bytes)
    return taken


@pytest.mark.slow
def test_growth_is_rare_and_leaves_a_64th_unused_at_most(pool):
    of_token = 2 * 2 * 16 * 4
    for rank, taken in enumerate(pool.run(grow, ranks=3)):
        for length, its_bytes in zip(itertools.accumulate(STEPS), taken, strict=True):
            held = Layout(3, BLOCK).local_length(length, rank)
            assert held <= its_bytes / of_token <= held + max(64, held // 64)
        assert len(set(taken)) <= 4


def traffic(group, name, reading, way):
    """Reading: received_bytes and calls; generate: received_bytes, calls, bytes handed to shared memory; the tokens."""
    ids, mask = prompt(False)
    model = tiny(name, "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    if way == "tree":  # as on several hosts
        cache.placement.link = None
    elif way == "both":  # the prompt is too much for the memory, a step is not
        cache.placement.link.capacity_bytes = 1000
    with record_traffic() as reads:
        if reading == "parallel":
            prefill(model, ids, cache, chunk_tokens=24)
    read_bytes = cache.received_bytes
    spy = mock.patch.object(SharedMemoryLink, "gather", autospec=True, side_effect=SharedMemoryLink.gather)
    with spy as shared, record_traffic() as writes:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
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


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "beam search": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "without a cache": {"use_cache": False},
    "sampling without a cache": {"do_sample": True, "use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


def write(group, name, way, static=False):
    """Each rank with a seed of its own, without naming a cache; also the cache's type, and the crops that cut it."""
    ids, mask = prompt(padded=True)
    if way == "prompt lookup":  # one row, which says a few things again and again
        ids, mask = ids[:1, :20].repeat(1, 4), torch.ones(1, 80, dtype=torch.long)
    model = tiny(name, "tree_attention" if group else "eager")
    torch.manual_seed(100 + (group.rank() if group else 0))
    how = {"past_key_values": TreeCache(model.config, group, max_tokens=120)} if static else {}
    with mock.patch.object(TreeCache, "crop", autospec=True, side_effect=TreeCache.crop) as crop:
        out = model.generate(ids, attention_mask=mask, **GREEDY | WAYS[way] | how)
    return out.sequences, torch.stack(out.logits), type(out.past_key_values), crop.call_count


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_ways_of_writing_with_the_automatic_cache(pool, name, way):
    if way == "prompt lookup" and name == "gemma2":
        return  # transformers cannot crop a window either
    results = pool.run(write, name, way)  # the automatic cache spans all ranks: 4
    assert_like_one_process([result[:2] for result in results], *write(None, name, way)[:2])
    for *_, cache, crops in results:
        assert cache is (type(None) if "without a cache" in way else TreeCache)
        assert bool(crops) == (way == "prompt lookup")


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if "without a cache" not in way])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_ways_of_writing_with_a_static_cache(pool, name, way):
    if way == "prompt lookup" and name == "gemma2":
        return
    results = pool.run(write, name, way, True, ranks=3)
    assert_like_one_process([result[:2] for result in results], *write(None, name, way)[:2])


def three_turns(group, name, static=False):
    """The text grows by 20 tokens between turns; -> it, logits, what the cache held after each, progress."""
    ids, mask = (t[:, :58] for t in prompt(padded=name == "gemma2"))
    model = tiny(name, "tree_attention" if group else "eager")
    cache = DynamicCache(config=model.config)
    if group:
        cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=124 if static else None)
    logits, held, progress = [], [], []
    for turn in range(3):
        if group:
            prefill(model, ids, cache, attention_mask=mask, chunk_tokens=24, on_progress=progress.append)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY | {"max_new_tokens": 9})
        logits += out.logits
        held.append(cache.get_seq_length())
        said = torch.randint(3, 256, (2, 20), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([out.sequences, said], 1)
        mask = torch.cat([mask, torch.ones(2, 29, dtype=torch.long)], 1)
    return ids, torch.stack(logits), held, progress


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("static", [False, True])
def test_three_turns_on_one_cache(pool, name, ranks, static):
    tokens, logits, held, _ = three_turns(None, name)
    assert held == [66, 95, 124]
    assert all(length % Layout(ranks, BLOCK).cycle for length in held)  # each turn ends within a cycle
    read = {  # first to the end of the cycle on all ranks alike, then in chunks
        2: [24, 48, 56, 72, 80, 96, 112],
        3: [24, 48, 72, 84, 96, 108],
        4: [16, 32, 48, 80, 96, 112],
    }
    results = pool.run(three_turns, name, static, ranks=ranks)
    assert_like_one_process([result[:2] for result in results], tokens, logits)
    for *_, its_held, progress in results:
        assert its_held == held
        assert progress == read[ranks]


def reset_between(group, max_tokens):
    ids, mask = prompt(padded=True)
    model = tiny("gemma2", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    model.generate(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache, **GREEDY)
    cache.reset()
    prefill(model, ids, cache, attention_mask=mask, chunk_tokens=24)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [None, TOKENS + NEW_TOKENS])
def test_a_cache_can_be_reset(pool, max_tokens):
    assert_like_one_process(pool.run(reset_between, max_tokens, ranks=3), *one_process("gemma2", True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "padded"),
    [("llama", False), *((name, True) for name in ("llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_next"))],
)
def test_torch_compile_takes_a_step_whole(monkeypatch, name, padded):
    """One graph for all steps and without a break, which fullgraph would not let pass."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function))
    tokens, logits = one_process(name, padded)
    assert_like_one_process([sharded(None, name, padded, "replicated", True, "compiled")], tokens, logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_one_compiled_step_for_caches_of_any_size(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function))
    (ids, mask), model, texts = prompt(False), tiny("gemma2", "tree_attention"), []
    for room in (TOKENS + NEW_TOKENS, 2 * TOKENS, 3 * TOKENS + 5):
        cache = TreeCache(model.config, block_tokens=BLOCK, max_tokens=room)
        cache.step = "compiled"
        texts.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY).sequences)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def within_a_window(group, max_tokens):
    """A text that does not fill a window of 12 before the last tokens."""
    ids, _ = prompt(padded=False)
    model = tiny("gemma2", "tree_attention" if group else "eager")
    cache = DynamicCache(config=model.config)
    if group:
        cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    out = model.generate(ids[:, :5], past_key_values=cache, **GREEDY)
    return out.sequences, torch.stack(out.logits)


def test_a_window_that_is_not_full(pool):
    assert_like_one_process(pool.run(within_a_window, 16, ranks=2), *within_a_window(None, None))


def received(group, max_tokens):
    ids, mask = prompt(padded=False)
    model = tiny("gemma2", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    return cache.received_bytes


def test_a_static_cache_counts_what_it_receives(pool):
    dynamic, static = (pool.run(received, max_tokens, ranks=2) for max_tokens in (None, 80))
    assert static == dynamic
    assert static[0] > 0


@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_refuses_a_filled_cache(llama, way):
    """transformers would feed it the whole text again, its own caches too, and write other tokens."""
    ids, cache = prompt(False)[0][:1], TreeCache(llama.config)
    prefill(llama, ids, cache)
    held, how = cache.get_seq_length(), {way: llama if way == "assistant_model" else 3}
    with pytest.raises(Unsupported, match=r"feeds a filled cache again in assisted decoding \(prompt_lookup"):
        llama.generate(ids, past_key_values=cache, **GREEDY | how)
    assert cache.get_seq_length() == held > 0


def test_prompt_lookup_has_room_for_its_guesses_or_is_refused(llama):
    ids, how = prompt(False)[0][:1, :20].repeat(1, 4), {"prompt_lookup_num_tokens": 10}
    most = ids.shape[1] + NEW_TOKENS - 2 + 10
    small, large = (TreeCache(llama.config, max_tokens=room) for room in (most - 1, most))
    with pytest.raises(InputError, match=f"has room for {most - 1} tokens over all ranks, {most} are needed"):
        llama.generate(ids, past_key_values=small, **GREEDY | how)
    assert small.get_seq_length() == 0
    texts = [llama.generate(ids, past_key_values=large, **GREEDY | how), llama.generate(ids, **GREEDY)]
    assert torch.equal(texts[0].sequences, texts[1].sequences)


@pytest.mark.parametrize("max_tokens", [None, 120])
def test_windows_are_cut_again_after_prompt_lookup(max_tokens):
    model, ids = tiny("gemma2", "tree_attention"), prompt(False)[0][:1, :20].repeat(1, 4)
    cache = TreeCache(model.config, max_tokens=max_tokens)
    ids = model.generate(ids, past_key_values=cache, **GREEDY | {"prompt_lookup_num_tokens": 3}).sequences
    out, expected = (model.generate(ids, past_key_values=its_cache, **GREEDY) for its_cache in (cache, None))
    assert_like_one_process(
        [(out.sequences, torch.stack(out.logits))], expected.sequences, torch.stack(expected.logits)
    )
    assert bool(cache.steps) == (max_tokens is not None)
    cache.layers[0].from_ring()
    assert cache.layers[0].keys.shape[2] == cache.layers[0].sliding_window - 1


@pytest.mark.slow
def test_windows_of_an_assistant_are_rolled_back():
    model, ids = tiny("gemma2", "tree_attention"), prompt(False)[0][:1]
    texts = [model.generate(ids, **GREEDY | how).sequences for how in ({}, {"assistant_model": model})]
    assert torch.equal(*texts)


def test_a_static_cache_reads_another_mask(llama):
    """As of a row that ended early, whose last tokens are hidden while the other row goes on."""
    results = []
    for max_tokens in (None, 80):
        cache = TreeCache(llama.config, max_tokens=max_tokens)
        ids = llama.generate(prompt(False)[0][:, :30], past_key_values=cache, **GREEDY).sequences
        mask = torch.ones_like(ids)
        mask[0, 31:39] = 0
        out = llama.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        results.append((out.sequences, torch.stack(out.logits)))
    assert_like_one_process(results[1:], *results[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_steps_with_its_own_weights(copied):
    model, ids = tiny("llama", "tree_attention"), prompt(False)[0]
    out = model.generate(ids, past_key_values=TreeCache(model.config, max_tokens=80), **GREEDY)
    other, cache = copied(model), TreeCache(model.config, max_tokens=80)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    again = other.generate(ids, past_key_values=cache, **GREEDY)
    assert bool(cache.steps)
    assert_like_one_process([(again.sequences, torch.stack(again.logits))], out.sequences, torch.stack(out.logits))


def test_a_forward_that_was_wrapped_before_is_called_in_steps():
    """As by accelerate, which puts a function on the model."""
    model, calls = tiny("llama", "tree_attention"), []
    original = model.forward
    model.forward = functools.wraps(original)(lambda **kwargs: calls.append(1) or original(**kwargs))
    model.generate(prompt(False)[0], past_key_values=TreeCache(model.config, max_tokens=80), **GREEDY)
    assert len(calls) == NEW_TOKENS


def break_off(model, layer, turn):
    """Let pass number `turn` end as by Ctrl-C in a layer, behind its attention."""

    def interrupt(*_):
        if next(turns) == turn:
            hook.remove()
            raise KeyboardInterrupt

    turns = itertools.count(1)
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)


def read_again(group, name):
    """A second prefill ends within its second chunk, and is called again; what the cache held between."""
    ids, mask = prompt(False)
    model = tiny(name, "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    prefill(model, ids[:, :20], cache)
    break_off(model, 2, 2)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, ids, cache, chunk_tokens=16)
    held = [layer.length for layer in cache.layers]
    prefill(model, ids, cache, chunk_tokens=24)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    return out.sequences, torch.stack(out.logits), held


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prefill_that_broke_off_leaves_what_there_was(pool, name):
    results = pool.run(read_again, name, ranks=2)
    assert_like_one_process([result[:2] for result in results], *one_process(name, False))
    assert [result[2] for result in results] == [[16] * 4] * 2


def test_a_cache_that_a_pass_broke_off_in_is_refused():
    model, ids = tiny("llama", "tree_attention"), prompt(False)[0]
    cache = TreeCache(model.config)
    break_off(model, 2, 4)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, **GREEDY)
    again = [
        lambda: model.generate(ids, past_key_values=cache, **GREEDY),
        lambda: prefill(model, torch.cat([ids, ids], 1), cache),
        lambda: model(ids[:, :1], past_key_values=cache),
    ]
    for use in again:
        with pytest.raises(InputError, match=r"a forward pass broke off.* make a new one on every rank"):
            use()
        assert [layer.length for layer in cache.layers] == [TOKENS + 3] * 3 + [TOKENS + 2]
    cache.reset()
    out = again[0]()
    assert_like_one_process([(out.sequences, torch.stack(out.logits))], *one_process("llama", False))


def test_a_layer_without_memory_has_read_nothing(llama):
    """Else its tokens would be missing, and every length say that they are there."""
    ids, cache = prompt(False)[0], TreeCache(llama.config)
    with mock.patch.object(cache.layers[-1], "grow", side_effect=MemoryError), pytest.raises(MemoryError):
        llama(ids, past_key_values=cache)
    with pytest.raises(InputError, match="a forward pass broke off"):
        llama(ids, past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_that_broke_off_is_run_again(name):
    """In place, where keys are written over; the cursor must not stay a token ahead."""
    tokens, logits = one_process(name, False)
    model = tiny(name, "tree_attention")
    cache = TreeCache(model.config, max_tokens=80)
    break_off(model, 2, 5)
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens[:, :TOKENS], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == TOKENS + 3
    feed = functools.partial(model, past_key_values=cache)
    with torch.no_grad():
        rest = [feed(input_ids=column[:, None]).logits[:, 0] for column in tokens[:, TOKENS + 3 : -1].T]
    assert_like_one_process([(tokens, torch.stack(rest))], tokens, logits[4:])


@pytest.mark.slow
def test_a_step_of_linear_attention_that_broke_off_is_refused():
    model, ids = tiny("qwen3_next", "tree_attention"), prompt(False)[0]
    cache = TreeCache(model.config, max_tokens=80)
    break_off(model, 0, 5)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, **GREEDY)
    with pytest.raises(InputError, match="a forward pass broke off"):
        model.generate(torch.cat([ids, ids], 1)[:, : TOKENS + 4], past_key_values=cache, **GREEDY)
    for _ in range(2):  # to undo what failed since does not make it whole
        with pytest.raises(InputError, match="a forward pass broke off"), undone_on_error(cache):
            cache.check_whole()
    cache.reset()
    out = model.generate(ids, past_key_values=cache, **GREEDY)
    assert_like_one_process([(out.sequences, torch.stack(out.logits))], *one_process("qwen3_next", False))


def graphs_before_their_group(group):
    """NCCL ends no group while a graph that holds one of its collectives is alive; test_gpu.py has such graphs."""
    model, (ids, _) = tiny("llama", "tree_attention"), prompt(False)
    own = dist.new_group()
    cache = TreeCache(model.config, own, block_tokens=BLOCK, max_tokens=TOKENS + 4)
    model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    before = len(cache.steps)
    dist.destroy_process_group(own)
    return before, len(cache.steps)


def test_graphs_are_dropped_before_a_group_ends(pool):
    assert pool.run(graphs_before_their_group) == [(1, 0)] * 4  # on all ranks, which make its group together


def linked_on_gpus(group):
    """What a step goes by on a GPU, of a group that has gloo as well (here only gloo: there is no NCCL)."""
    cache = TreeCache(tiny("llama", "tree_attention").config, group, max_tokens=40)
    q = mock.Mock(is_cuda=True, shape=(1, 1, 4, 16))
    cache.placement.cursor = mock.Mock()
    with mock.patch.multiple(placement, _symmetric=lambda *_: "link", tree_decode=lambda *_, **how: how["group"]):
        return cache.placement.step_over(q, q, q, None), isinstance(cache.placement.link, SharedMemoryLink)


def test_gpus_ask_for_their_link_beside_gloo_too(pool):
    assert pool.run(linked_on_gpus, ranks=2) == [("link", False)] * 2


def in_one_place(group):
    """A static cache's bytes and addresses after each of three turns, and by how much it is refused."""
    ids, mask = prompt(padded=False)
    model = tiny("llama", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=100)
    seen, refused = [], []
    for tokens in (40, 50, 61):
        model.generate(ids[:, :tokens], attention_mask=mask[:, :tokens], past_key_values=cache, **GREEDY)
        cache.crop(tokens - 1 - cache.get_seq_length())
        seen.append((cache.kv_bytes, [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]))
    for new_tokens in (40, 41):
        try:
            model.generate(ids, past_key_values=cache, **GREEDY | {"max_new_tokens": new_tokens})
        except InputError as error:
            refused.append((str(error), cache.get_seq_length()))
    try:
        with torch.no_grad():
            model(torch.zeros(2, 2, dtype=torch.long), past_key_values=cache)
    except InputError as error:
        refused.append((str(error), cache.get_seq_length()))
    return seen, refused


def test_a_static_cache_stays_in_one_place_and_says_when_it_is_full(pool):
    for rank, (seen, refused) in enumerate(pool.run(in_one_place, ranks=2)):
        assert seen == [seen[0]] * 3
        places = Layout(2, BLOCK).local_length(100, rank) + 1  # one is never read
        assert seen[0][0] == places * 4 * 2 * ROWS * 2 * 16 * 4  # layers, K and V, rows, KV heads, head dim, bytes
        text = "this TreeCache has room for 100 tokens over all ranks, {} are needed: make it with a larger max_tokens"
        assert refused == [(text.format(101), 100), (text.format(102), 100)]


def with_long_padding(group, name):
    """Padding over more than a chunk: whole chunks in which a row has no key to attend to."""
    ids, mask = prompt(padded=True)
    mask[1, :40], ids[1, :40] = 0, 0
    model = tiny(name, "tree_attention" if group else "eager")
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    if group:
        prefill(model, ids, cache, attention_mask=mask, chunk_tokens=1)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_chunks_of_padding_alone(pool, name):
    assert_like_one_process(pool.run(with_long_padding, name, ranks=3), *with_long_padding(None, name))


def with_mask_by_hand(group, name):
    """A 4-D mask: both directions in the first 20 slots, causal after, and holes; for the prompt and for a step."""
    ids, _ = prompt(False)
    q_slot, k_slot = torch.arange(TOKENS + 1)[:, None], torch.arange(TOKENS + 1)[None, :]
    visible = torch.rand(2, 1, TOKENS + 1, TOKENS + 1, generator=torch.Generator().manual_seed(2)) < 0.7
    visible = visible & ((k_slot <= q_slot) | ((k_slot < 20) & (q_slot < 20))) | (k_slot == q_slot)
    if group is None:  # eager attention adds its mask
        visible = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = tiny(name, "tree_attention" if group else "eager")
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids, attention_mask=visible[:, :, :TOKENS, :TOKENS], past_key_values=cache).logits
        tokens = logits[:, -1:].argmax(-1)
        step = model(tokens, attention_mask=visible[:, :, TOKENS:], past_key_values=cache).logits
    return tokens, torch.cat([logits, step], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_bool_mask_of_four_dimensions(pool, name):
    assert_like_one_process(pool.run(with_mask_by_hand, name, ranks=3), *with_mask_by_hand(None, name))


def chunked_after_a_turn(group):
    """prefill_chunk_size with a cache that holds tokens; -> tokens, or the error's text."""
    ids, mask = prompt(False)
    model = tiny("llama", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    prefill(model, ids[:, :40], cache, chunk_tokens=24)
    try:
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=16, **GREEDY
        ).sequences
    except Unsupported as error:
        return str(error)


@pytest.mark.slow
def test_prefill_chunk_size_with_a_filled_cache(pool):
    for result in pool.run(chunked_after_a_turn, ranks=3):
        if OLD:
            assert "feeds a filled cache again when prefill_chunk_size is set" in result
        else:
            assert torch.equal(result, one_process("llama", False)[0])


@pytest.mark.slow
def test_one_process_without_a_group(tmp_path):
    tiny("gemma2", "eager").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="tree_attention").eval()
    for padded in (False, True):
        ids, mask = prompt(padded)
        cache = TreeCache(model.config, block_tokens=BLOCK)
        prefill(model, ids, cache, attention_mask=mask, chunk_tokens=24)
        for how in ({}, {"past_key_values": cache}):
            out = model.generate(ids, attention_mask=mask, **how, **GREEDY)
            assert isinstance(out.past_key_values, TreeCache)
            assert out.past_key_values.received_bytes == 0
            assert_like_one_process([(out.sequences, torch.stack(out.logits))], *one_process("gemma2", padded))


def cache_of_rank(group, what):
    config = tiny("llama", "tree_attention").config
    block = BLOCK
    if group.rank() == 1:
        if what == "block_tokens":
            block = 2 * BLOCK
        else:
            config.rope_theta = 5.0
    try:
        TreeCache(config, group, block_tokens=block)
    except RanksDisagree as error:
        return str(error)


@pytest.mark.slow
def test_caches_that_differ_are_refused_on_every_rank(pool):
    text = "block_tokens must be the same on every rank, got rank 0: 4, rank 1: 8, rank 2: 4"
    assert pool.run(cache_of_rank, "block_tokens", ranks=3) == [text] * 3
    for said in pool.run(cache_of_rank, "config", ranks=3):
        assert said.startswith("model config must be the same on every rank, got rank 0: ")


def stock_attention_on_ranks(group):
    """A TreeCache in a model that was loaded with another attention would see this rank's keys alone."""
    ids, mask = prompt(False)
    model = tiny("llama", "sdpa")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    try:
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY).sequences
    except InputError as error:
        return str(error)


@pytest.mark.slow
def test_a_tree_cache_needs_tree_attention(pool):
    for said in pool.run(stock_attention_on_ranks, ranks=2):
        assert isinstance(said, str), "tokens of one rank's keys, and no error"
        assert "attn_implementation='tree_attention'" in said


@pytest.mark.slow
def test_prefill_of_linear_attention_is_refused():
    model = tiny("qwen3_next", "tree_attention")
    cache = TreeCache(model.config)
    assert not can_prefill(cache)
    with pytest.raises(Unsupported, match=r"cannot feed .*, which carries a state.*prefill_chunk_size=n"):
        prefill(model, prompt(False)[0], cache)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", "tree_attention")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported.*leave it out"),
        ({"max_time": 1.0}, "max_time would stop the ranks at different tokens: use max_new_tokens"),
    ],
)
def test_generate_refuses(llama, how, text):
    ids, mask = prompt(False)
    with pytest.raises(Unsupported, match=text):
        llama.generate(ids, attention_mask=mask, **how, **GREEDY)


@pytest.mark.slow
def test_dropout_is_refused():
    model = tiny("llama", "tree_attention")
    model.model.layers[0].self_attn.attention_dropout = 0.1
    model(prompt(False)[0])
    with pytest.raises(Unsupported, match=r"no dropout, got 0.1: call model.eval\(\)"):
        model.train()(prompt(False)[0])


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_masks_that_are_refused(llama, cached):
    how = {"past_key_values": TreeCache(llama.config)} if cached else {"use_cache": False}
    with pytest.raises(Unsupported, match=r"4-D attention_mask must be bool .*, got torch.float32: pass mask >= 0"):
        llama(prompt(False)[0], attention_mask=torch.zeros(2, 1, TOKENS, TOKENS), **how)


@pytest.mark.slow
def test_a_mask_by_head_is_refused(llama):
    mask = torch.ones(2, HEADS, TOKENS, TOKENS, dtype=torch.bool).tril()
    mask[:, 1, :, 1:30] = False
    with pytest.raises(TreeAttentionError, match="mask"):
        llama(prompt(False)[0], attention_mask=mask, past_key_values=TreeCache(llama.config))


@pytest.mark.slow
def test_a_mask_over_more_than_a_window_is_refused():
    """Transformers' own attention raises here too: in a step, a window's keys are the last 12 slots, not the first."""
    model = tiny("gemma2", "tree_attention")
    cache = TreeCache(model.config)
    model(prompt(False)[0], past_key_values=cache)
    with pytest.raises(TreeAttentionError, match="mask"):
        model(torch.ones(2, 1, dtype=torch.long), attention_mask=torch.ones(2, 1, 1, 62).bool(), past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "sdpa"}, "loaded with attn_implementation='tree_attention', got 'sdpa'"),
        ({"cache": "stock"}, "cache must be a TreeCache, got DynamicCache"),
        ({"input_ids": torch.ones(2, 40, dtype=torch.long)}, r"more tokens than the 40 in the cache, got \[2, 40\]"),
        ({"input_ids": torch.ones(61, dtype=torch.long)}, r"input_ids must be \[B, tokens\] .* got \[61\]"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
    ],
)
def test_prefill_refuses(llama, change, text):
    ids, cache = prompt(False)[0], TreeCache(llama.config)
    llama(ids[:, :40], past_key_values=cache)
    given = {"model": llama, "input_ids": ids, "cache": cache} | change
    if given["model"] == "sdpa":
        given["model"] = tiny("llama", "sdpa")
    if given["cache"] == "stock":
        given["cache"] = DynamicCache(config=llama.config)
    with pytest.raises(InputError, match=text):
        prefill(**given)
    assert cache.get_seq_length() == 40


def test_prefill_reads_nothing_of_a_text_without_room(llama):
    cache = TreeCache(llama.config, max_tokens=TOKENS - 1)
    with pytest.raises(InputError, match="has room for 60 tokens over all ranks, 61 are needed"):
        prefill(llama, prompt(False)[0], cache, chunk_tokens=16)
    assert cache.get_seq_length() == 0


def test_prefill_refuses_another_cache_before_it_looks_into_it(llama):
    with pytest.raises(InputError, match="cache must be a TreeCache, got DynamicCache"):
        prefill(llama, prompt(False)[0].to("meta"), DynamicCache(config=llama.config))  # type: ignore[arg-type]


@pytest.mark.parametrize("block_tokens", [0, -1])
def test_block_tokens_below_one(llama, block_tokens):
    with pytest.raises(InputError, match=f"at least 1, got 1 and {block_tokens}"):
        TreeCache(llama.config, block_tokens=block_tokens)
