"""Static caches: steps through the cursor, compiled, interrupted and repeated, in memory that stays in place."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from transformers import DynamicCache

from architectures import (
    BLOCK,
    GREEDY,
    NEW_TOKENS,
    ROWS,
    TOKENS,
    assert_like_one_process,
    break_off,
    one_process,
    prompt,
    sharded,
    tiny,
)
from tree_attention import InputError
from tree_attention.hf import TreeCache
from tree_attention.hf.inputs import CACHE
from tree_attention.hf.layer_state import restore_on_error
from tree_attention.layout import Layout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "padded"),
    [("llama", False), *((name, True) for name in ("llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_next"))],
)
def test_torch_compile_takes_a_step_whole(monkeypatch, name, padded):
    """One graph serves all steps. With fullgraph a graph break raises."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function))
    result = sharded(None, name, padded, "replicated", True, "compiled", layers=2)
    assert_like_one_process([result], *one_process(name, padded, layers=2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_one_compiled_step_for_caches_of_any_size(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function))
    (ids, mask), model, texts = prompt(False), tiny("gemma2", "tree_attention"), []
    for room in (TOKENS + NEW_TOKENS, 2 * TOKENS, 3 * TOKENS + 5):
        cache = TreeCache(model.config, block_tokens=BLOCK, max_tokens=room, step="compiled")
        texts.append(model.generate(ids, attention_mask=mask, cache=cache, **GREEDY).sequences)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def within_a_window(group, max_tokens):
    """The text fills a window of 12 only with its last tokens."""
    ids, _ = prompt(padded=False)
    model = tiny("gemma2", "tree_attention" if group else "eager")
    cache = DynamicCache(config=model.config)
    if group:
        cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    out = model.generate(ids[:, :5], cache=cache, **GREEDY)
    return out.sequences, torch.stack(out.logits)


def test_a_window_that_is_not_full(pool):
    assert_like_one_process(pool.run(within_a_window, 16, ranks=2), *within_a_window(None, None))


def test_a_static_cache_reads_another_mask(llama):
    """For example if a row ended early, and its last tokens are hidden while the other row goes on."""
    results = []
    for max_tokens in (None, 80):
        cache = TreeCache(llama.config, max_tokens=max_tokens)
        ids = llama.generate(prompt(False)[0][:, :30], cache=cache, **GREEDY).sequences
        mask = torch.ones_like(ids)
        mask[0, 31:39] = 0
        out = llama.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
        results.append((out.sequences, torch.stack(out.logits)))
    assert_like_one_process(results[1:], *results[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_steps_with_its_own_weights(copied):
    model, ids = tiny("llama", "tree_attention"), prompt(False)[0]
    out = model.generate(ids, cache=TreeCache(model.config, max_tokens=80), **GREEDY)
    other, cache = copied(model), TreeCache(model.config, max_tokens=80)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    again = other.generate(ids, cache=cache, **GREEDY)
    assert bool(cache.captured_steps)
    assert_like_one_process([(again.sequences, torch.stack(again.logits))], out.sequences, torch.stack(out.logits))


def test_a_forward_that_was_wrapped_before_is_called_in_steps():
    """For example by accelerate, which replaces `model.forward` by a function."""
    model, calls = tiny("llama", "tree_attention"), []
    original = model.forward
    model.forward = functools.wraps(original)(lambda **kwargs: calls.append(1) or original(**kwargs))
    model.generate(prompt(False)[0], cache=TreeCache(model.config, max_tokens=80), **GREEDY)
    assert len(calls) == NEW_TOKENS


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_that_broke_off_is_run_again(name):
    """The repeated step overwrites its keys; the cursor must not stay one token ahead."""
    tokens, logits = one_process(name, False)
    model = tiny(name, "tree_attention")
    cache = TreeCache(model.config, max_tokens=80)
    break_off(model, 2, 5)
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens[:, :TOKENS], cache=cache, **GREEDY)
    assert cache.get_seq_length() == TOKENS + 3
    feed = functools.partial(model, **{CACHE: cache})
    with torch.no_grad():
        rest = [feed(input_ids=column[:, None]).logits[:, 0] for column in tokens[:, TOKENS + 3 : -1].T]
    assert_like_one_process([(tokens, torch.stack(rest))], tokens, logits[4:])


@pytest.mark.slow
def test_a_step_of_linear_attention_that_broke_off_is_refused():
    model, ids = tiny("qwen3_next", "tree_attention"), prompt(False)[0]
    cache = TreeCache(model.config, max_tokens=80)
    break_off(model, 0, 5)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, cache=cache, **GREEDY)
    with pytest.raises(InputError, match="a forward pass was interrupted"):
        model.generate(torch.cat([ids, ids], 1)[:, : TOKENS + 4], cache=cache, **GREEDY)
    for _ in range(2):  # to undo what failed since does not make it whole
        with pytest.raises(InputError, match="a forward pass was interrupted"), restore_on_error(cache):
            cache.check_ready(0)
    cache.reset()
    out = model.generate(ids, cache=cache, **GREEDY)
    assert_like_one_process([(out.sequences, torch.stack(out.logits))], *one_process("qwen3_next", False))


def graphs_before_their_group(group):
    """NCCL cannot end a group while a graph with one of its collectives is alive; test_gpu.py has such graphs."""
    model, (ids, _) = tiny("llama", "tree_attention"), prompt(False)
    own = dist.new_group()
    cache = TreeCache(model.config, own, block_tokens=BLOCK, max_tokens=TOKENS + 4)
    model.generate(ids, cache=cache, max_new_tokens=4, do_sample=False)
    before = len(cache.captured_steps)
    dist.destroy_process_group(own)
    return before, len(cache.captured_steps)


def test_graphs_are_dropped_before_a_group_ends(pool):
    assert pool.run(graphs_before_their_group) == [(1, 0)] * 4  # on all ranks, which make its group together


def in_one_place(group):
    """Return a static cache's bytes and addresses after each of three turns, and the texts of what it refuses."""
    ids, mask = prompt(padded=False)
    model = tiny("llama", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=100)
    seen, refused = [], []
    for tokens in (40, 50, 61):
        model.generate(ids[:, :tokens], attention_mask=mask[:, :tokens], cache=cache, **GREEDY)
        cache.crop(tokens - 1 - cache.get_seq_length())
        seen.append((cache.kv_bytes, [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]))
    for new_tokens in (40, 41):
        try:
            model.generate(ids, cache=cache, **GREEDY | {"max_new_tokens": new_tokens})
        except InputError as error:
            refused.append((str(error), cache.get_seq_length()))
    try:
        with torch.no_grad():
            model(torch.zeros(2, 2, dtype=torch.long), **{CACHE: cache})
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
