"""Every architecture with a cache that is spread over ranks: one process's tokens, and equal bits on every rank."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from architectures import (
    ARCHITECTURES,
    BLOCK,
    GREEDY,
    assert_like_one_process,
    one_process,
    prompt,
    readings,
    sharded,
    tiny,
)
from tree_attention.hf import TreeCache, prefill
from tree_attention.hf.inputs import CACHE


@pytest.mark.parametrize("reading", ["replicated", "parallel"])
@pytest.mark.parametrize("static", [False, True])
def test_llama_on_two_ranks(pool, reading, static):
    assert_like_one_process(pool.run(sharded, "llama", False, reading, static, ranks=2), *one_process("llama", False))


def _layers(name):
    """One layer of each kind; the kinds of Llama 4 follow fields for four layers."""
    return 4 if name == "llama4_text" else 2


def every_reading(group, name, static):
    return {
        (pad, reading): sharded(group, name, pad, reading, static, layers=_layers(name))
        for pad in (False, True)
        for reading in readings(name)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "static"), [(2, False), (4, False), (3, True)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_way_of_reading(pool, name, ranks, static):
    results = pool.run(every_reading, name, static, ranks=ranks)
    for padded, reading in results[0]:
        of_ranks = [result[padded, reading] for result in results]
        assert_like_one_process(of_ranks, *one_process(name, padded, layers=_layers(name)))


@pytest.mark.slow
def test_one_process_without_a_group(tmp_path):
    tiny("gemma2", "eager").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="tree_attention").eval()
    for padded in (False, True):
        ids, mask = prompt(padded)
        cache = TreeCache(model.config, block_tokens=BLOCK)
        prefill(model, ids, cache, attention_mask=mask, chunk_tokens=24)
        for how in ({}, {"cache": cache}):
            out = model.generate(ids, attention_mask=mask, **how, **GREEDY)
            assert isinstance(out[CACHE], TreeCache)
            assert out[CACHE].received_bytes == 0
            assert_like_one_process([(out.sequences, torch.stack(out.logits))], *one_process("gemma2", padded))


def with_long_padding(group, name):
    """Padding longer than a chunk: in whole chunks a row has no key to attend to."""
    ids, mask = prompt(padded=True)
    mask[1, :40], ids[1, :40] = 0, 0
    model = tiny(name, "tree_attention" if group else "eager")
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    if group:
        prefill(model, ids, cache, attention_mask=mask, chunk_tokens=1)
    out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_chunks_of_padding_alone(pool, name):
    assert_like_one_process(pool.run(with_long_padding, name, ranks=3), *with_long_padding(None, name))
