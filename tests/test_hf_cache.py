"""What a TreeCache holds: its share of the tokens, over several turns, and after an interrupted forward pass."""

import itertools
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

from architectures import (
    BLOCK,
    GREEDY,
    NEW_TOKENS,
    RESULTS_OF_A_STEP,
    TOKENS,
    assert_like_one_process,
    break_off,
    one_process,
    prompt,
    tiny,
)
from tree_attention import InputError, RanksDisagree
from tree_attention.hf import TreeCache, prefill
from tree_attention.hf.inputs import CACHE
from tree_attention.layout import Layout


def what_is_held(group, name, reserved):
    """Return the keys of each layer that this rank holds, and the bytes that are allocated."""
    ids, mask = prompt(False)
    model = tiny(name, "tree_attention" if group else "eager")
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    if reserved:
        cache.reserve(TOKENS + NEW_TOKENS - 1)
    model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
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
    """Return the bytes that are allocated after each update."""
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


def three_turns(group, name, static=False):
    """The text grows by 20 tokens between turns. Return it, the logits, the lengths after each turn, the progress."""
    ids, mask = (t[:, :58] for t in prompt(padded=name == "gemma2"))
    model = tiny(name, "tree_attention" if group else "eager")
    cache = DynamicCache(config=model.config)
    if group:
        cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=124 if static else None)
    logits, held, progress = [], [], []
    for turn in range(3):
        if group:
            prefill(model, ids, cache, attention_mask=mask, chunk_tokens=24, on_progress=progress.append)
        out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY | {"max_new_tokens": 9})
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
    model.generate(ids[:, :40], attention_mask=mask[:, :40], cache=cache, **GREEDY)
    cache.reset()
    prefill(model, ids, cache, attention_mask=mask, chunk_tokens=24)
    out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [None, TOKENS + NEW_TOKENS])
def test_a_cache_can_be_reset(pool, max_tokens):
    assert_like_one_process(pool.run(reset_between, max_tokens, ranks=3), *one_process("gemma2", True))


def read_again(group, name):
    """A second prefill fails in its second chunk and is repeated. Return also the lengths in between."""
    ids, mask = prompt(False)
    model = tiny(name, "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    prefill(model, ids[:, :20], cache)
    break_off(model, 2, 2)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, ids, cache, chunk_tokens=16)
    held = [layer.length for layer in cache.layers]
    prefill(model, ids, cache, chunk_tokens=24)
    out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
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
        model.generate(ids, cache=cache, **GREEDY)
    again = [
        lambda: model.generate(ids, cache=cache, **GREEDY),
        lambda: prefill(model, torch.cat([ids, ids], 1), cache),
        lambda: model(ids[:, :1], **{CACHE: cache}),
    ]
    for use in again:
        with pytest.raises(InputError, match=r"a forward pass was interrupted.* create a new one on every rank"):
            use()
        assert [layer.length for layer in cache.layers] == [TOKENS + 3] * 3 + [TOKENS + 2]
    cache.reset()
    out = again[0]()
    assert_like_one_process([(out.sequences, torch.stack(out.logits))], *one_process("llama", False))


def test_a_layer_without_memory_has_read_nothing(llama):
    """Otherwise its tokens would be missing although its length says that they are there."""
    ids, cache = prompt(False)[0], TreeCache(llama.config)
    with mock.patch.object(cache.layers[-1], "grow", side_effect=MemoryError), pytest.raises(MemoryError):
        llama(ids, **{CACHE: cache})
    with pytest.raises(InputError, match="a forward pass was interrupted"):
        llama(ids, **{CACHE: cache})


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
    """With another attention implementation a model would only see this rank's keys."""
    ids, mask = prompt(False)
    model = tiny("llama", "sdpa")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    try:
        return model.generate(ids, attention_mask=mask, cache=cache, **GREEDY).sequences
    except InputError as error:
        return str(error)


@pytest.mark.slow
def test_a_tree_cache_needs_tree_attention(pool):
    for said in pool.run(stock_attention_on_ranks, ranks=2):
        assert isinstance(said, str), "tokens of one rank's keys, and no error"
        assert "attn_implementation='tree_attention'" in said


@pytest.mark.parametrize("block_tokens", [0, -1])
def test_block_tokens_below_one(llama, block_tokens):
    with pytest.raises(InputError, match=f"at least 1, got 1 and {block_tokens}"):
        TreeCache(llama.config, block_tokens=block_tokens)
