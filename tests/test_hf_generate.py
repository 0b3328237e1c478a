"""`generate` with a TreeCache: every way of decoding, assisted decoding, and what is refused."""

from unittest import mock

import pytest
import torch

from architectures import BLOCK, GREEDY, NEW_TOKENS, OLD, assert_like_one_process, one_process, prompt, tiny
from tree_attention import InputError, Unsupported
from tree_attention.hf import TreeCache, prefill
from tree_attention.hf.inputs import CACHE

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
    """Generate with a different seed on each rank. Return also the cache's type and the number of crops."""
    ids, mask = prompt(padded=True)
    if way == "prompt lookup":  # one row, which says a few things again and again
        ids, mask = ids[:1, :20].repeat(1, 4), torch.ones(1, 80, dtype=torch.long)
    model = tiny(name, "tree_attention" if group else "eager")
    torch.manual_seed(100 + (group.rank() if group else 0))
    how = {"cache": TreeCache(model.config, group, max_tokens=120)} if static else {}
    with mock.patch.object(TreeCache, "crop", autospec=True, side_effect=TreeCache.crop) as crop:
        out = model.generate(ids, attention_mask=mask, **GREEDY | WAYS[way] | how)
    return out.sequences, torch.stack(out.logits), type(out.get(CACHE)), crop.call_count


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


@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_refuses_a_filled_cache(llama, way):
    """transformers would feed the whole text again, to its own caches too, and generate other tokens."""
    ids, cache = prompt(False)[0][:1], TreeCache(llama.config)
    prefill(llama, ids, cache)
    held, how = cache.get_seq_length(), {way: llama if way == "assistant_model" else 3}
    with pytest.raises(Unsupported, match=r"feeds a filled cache again in assisted decoding \(prompt_lookup"):
        llama.generate(ids, cache=cache, **GREEDY | how)
    assert cache.get_seq_length() == held > 0


def test_prompt_lookup_has_room_for_its_guesses_or_is_refused(llama):
    ids, how = prompt(False)[0][:1, :20].repeat(1, 4), {"prompt_lookup_num_tokens": 10}
    most = ids.shape[1] + NEW_TOKENS - 2 + 10
    small, large = (TreeCache(llama.config, max_tokens=room) for room in (most - 1, most))
    with pytest.raises(InputError, match=f"has room for {most - 1} tokens over all ranks, {most} are needed"):
        llama.generate(ids, cache=small, **GREEDY | how)
    assert small.get_seq_length() == 0
    texts = [llama.generate(ids, cache=large, **GREEDY | how), llama.generate(ids, **GREEDY)]
    assert torch.equal(texts[0].sequences, texts[1].sequences)


@pytest.mark.parametrize("max_tokens", [None, 120])
def test_windows_are_cut_again_after_prompt_lookup(max_tokens):
    model, ids = tiny("gemma2", "tree_attention"), prompt(False)[0][:1, :20].repeat(1, 4)
    cache = TreeCache(model.config, max_tokens=max_tokens)
    ids = model.generate(ids, cache=cache, **GREEDY | {"prompt_lookup_num_tokens": 3}).sequences
    out, expected = (model.generate(ids, cache=its_cache, **GREEDY) for its_cache in (cache, None))
    assert_like_one_process(
        [(out.sequences, torch.stack(out.logits))], expected.sequences, torch.stack(expected.logits)
    )
    assert bool(cache.captured_steps) == (max_tokens is not None)
    cache.layers[0].from_ring()
    assert cache.layers[0].keys.shape[2] == cache.layers[0].sliding_window - 1


@pytest.mark.slow
def test_windows_of_an_assistant_are_rolled_back():
    model, ids = tiny("gemma2", "tree_attention"), prompt(False)[0][:1]
    texts = [model.generate(ids, **GREEDY | how).sequences for how in ({}, {"assistant_model": model})]
    assert torch.equal(*texts)


def chunked_after_a_turn(group):
    """Use prefill_chunk_size with a cache that holds tokens. Return the tokens, or the text of the error."""
    ids, mask = prompt(False)
    model = tiny("llama", "tree_attention")
    cache = TreeCache(model.config, group, block_tokens=BLOCK)
    prefill(model, ids[:, :40], cache, chunk_tokens=24)
    try:
        return model.generate(ids, attention_mask=mask, cache=cache, prefill_chunk_size=16, **GREEDY).sequences
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


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_work_without_a_warning(llama, name):
    ids, cache = prompt(False)[0], TreeCache(llama.config)
    out = llama.generate(ids, **{name: cache}, max_new_tokens=2, do_sample=False)
    assert cache.get_seq_length() == out.shape[1] - 1
