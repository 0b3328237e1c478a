"""What a caller may do around a call: inference mode, autocast, copies of the cache, outputs that we do not give."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from architectures import BLOCK, GREEDY, prompt, tiny
from tree_attention import InputError, Unsupported
from tree_attention.hf import TreeCache
from tree_attention.hf.inputs import CACHE
from tree_attention.hf.step import install_step

CALLS = ("create", "read", "rows", "write", "again")


def talked(group, name, max_tokens, inference):
    """Two answers, of more rows than were read; `inference`: the calls around which inference mode is on."""
    ids, _ = prompt(padded=False)
    model, how = tiny(name, "tree_attention", layers=2), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode("create" in inference):
        cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    with torch.inference_mode("read" in inference), torch.no_grad():
        model(ids[:, :-1], **{CACHE: cache})
    if cache.key_layers == cache.layers:  # transformers' linear-attention layers cannot
        with torch.inference_mode("rows" in inference):
            cache.batch_repeat_interleave(2)
        ids = ids.repeat_interleave(2, 0)
    for call in ("write", "again"):
        with torch.inference_mode(call in inference):
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **how).clone()
    return ids.tolist()


def modes(group, name, max_tokens):
    expected = talked(group, name, max_tokens, ())
    each = [*((call,) for call in CALLS), ("create", "read", "rows", "write"), ("rows", "write"), CALLS[1:]]
    return [inference for inference in each if talked(group, name, max_tokens, inference) != expected]


@pytest.mark.parametrize("max_tokens", [None, 80])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
def test_inference_mode_may_be_on_in_some_calls(pool, name, max_tokens):
    assert pool.run(modes, name, max_tokens, ranks=2) == [[], []]


AUTOCAST_TOLERANCE = 2**-6  # of the largest logit: a few roundings of bfloat16, in which all products are


def without_rotation(implementation):
    """A GPT-2: nothing between its projections and the cache computes in float32 under autocast."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=64, n_head=4, n_layer=2, n_positions=128, initializer_range=0.2)
    return GPT2LMHeadModel._from_config(config, attn_implementation=implementation).eval()


def logits_cast(group, name, max_tokens, inside, implementation="tree_attention"):
    """Logits of a text that is read in two parts and then token by token, each with autocast or without."""
    ids, _ = prompt(padded=False)
    model, found = without_rotation(implementation) if name == "gpt2" else tiny(name, implementation, layers=2), []
    cache = DynamicCache(config=model.config)
    if implementation == "tree_attention":
        cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
        install_step(model)
    parts = [(0, 30), (30, 50), *((i, i + 1) for i in range(50, 60))]
    for (start, stop), is_inside in zip(parts, [*inside[:2], *[inside[2]] * 10], strict=True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_inside):
            out = model(input_ids=ids[:, start:stop], **{CACHE: cache}, use_cache=True)
            found.append(out.logits.float())
    return torch.cat(found, 1)


ALL, FIRST, SECOND, LATER = (True, True, True), (True, False, False), (False, True, False), (False, True, True)


@pytest.mark.parametrize(
    ("name", "inside"),
    [("llama", ALL), ("llama", FIRST), ("gpt2", ALL), ("gpt2", SECOND), ("gemma2", ALL), ("gemma2", LATER)],
)
def test_autocast_may_be_on_in_some_calls(pool, name, inside):
    expected = logits_cast(None, name, None, inside, "eager")
    for max_tokens in (None, 80):
        first, second = pool.run(logits_cast, name, max_tokens, inside, ranks=2)
        assert torch.equal(first, second)
        assert (first - expected).abs().max() <= AUTOCAST_TOLERANCE * expected.abs().max()


def test_a_step_that_would_round_keys_is_refused():
    """Read inside autocast, the keys of GPT-2 are bfloat16; a growing cache widens its buffers, a step cannot."""
    inside = (True, True, False)
    expected = logits_cast(None, "gpt2", None, inside, "eager")
    found = logits_cast(None, "gpt2", None, inside)
    assert (found - expected).abs().max() <= AUTOCAST_TOLERANCE * expected.abs().max()
    with pytest.raises(InputError, match=r"holds torch.bfloat16 got keys in torch.float32: make all calls inside"):
        logits_cast(None, "gpt2", 80, inside)


def branches(group, name, max_tokens):
    """Two questions about one prompt: each on a copy of its cache, then the first one on the cache itself."""
    ids, _ = prompt(padded=False)
    model, how = tiny(name, "tree_attention", layers=2), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    with torch.no_grad():
        model(ids[:, :-1], **{CACHE: cache}, use_cache=True)
    texts = [torch.cat([ids, torch.full((2, 3), token)], 1) for token in (7, 8)]
    one, other = (copy.deepcopy(cache) for _ in texts)
    assert one.exchange.link is None or one.exchange.link is not cache.exchange.link
    answers = [model.generate(text, cache=each, **how) for text, each in zip(texts, (one, other), strict=True)]
    assert cache.get_seq_length() == ids.shape[1] - 1
    answers.append(model.generate(texts[0], cache=cache, **how))
    return [answer.tolist() for answer in answers]


@pytest.mark.parametrize(("name", "max_tokens"), [("llama", None), ("gemma2", 90), ("qwen3_next", None)])
def test_a_copied_cache_goes_its_own_way(pool, name, max_tokens):
    first, second = pool.run(branches, name, max_tokens, ranks=2)
    assert first == second
    assert first[0] == first[2] != first[1]
    assert first == branches(None, name, max_tokens)


@pytest.mark.parametrize("call", [pickle.dumps, copy.copy])
def test_a_cache_is_not_pickled(llama, call):
    with pytest.raises(Unsupported, match=r"cannot be pickled: save a Session with session.save\(folder\), or copy"):
        call(TreeCache(llama.config))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_weights_are_refused(name):
    ids, _ = prompt(padded=False)
    model = without_rotation("tree_attention") if name == "gpt2" else tiny(name, "tree_attention", layers=2)
    cache = TreeCache(model.config)
    with pytest.raises(Unsupported, match="output_attentions=True is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(Unsupported, match="output_attentions=True is not supported"):
        model.generate(ids, cache=cache, max_new_tokens=2, output_attentions=True)
    out = model.generate(ids, cache=cache, **{**GREEDY, "max_new_tokens": 2})
    assert len(out.logits) == 2
    assert model(ids, output_attentions=False, output_hidden_states=True).hidden_states
