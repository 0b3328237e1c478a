"""What a caller may do around a call: inference mode, autocast, copies of the cache, outputs that we do not give."""

import pytest
import torch

from architectures import BLOCK, prompt, tiny
from tree_attention.hf import TreeCache

CALLS = ("create", "read", "rows", "write", "again")


def talked(group, name, max_tokens, inference):
    """Two answers, of more rows than were read; `inference`: the calls around which inference mode is on."""
    ids, _ = prompt(padded=False)
    model, how = tiny(name, "tree_attention", layers=2), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode("create" in inference):
        cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
    with torch.inference_mode("read" in inference), torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    if cache.key_layers == cache.layers:  # transformers' linear-attention layers cannot
        with torch.inference_mode("rows" in inference):
            cache.batch_repeat_interleave(2)
        ids = ids.repeat_interleave(2, 0)
    for call in ("write", "again"):
        with torch.inference_mode(call in inference):
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **how).clone()
    return ids.tolist()


def modes(group, name, max_tokens):
    expected = talked(group, name, max_tokens, ())
    each = [*((call,) for call in CALLS), ("create", "read", "rows", "write"), ("rows", "write"), CALLS[1:]]
    return [inference for inference in each if talked(group, name, max_tokens, inference) != expected]


@pytest.mark.parametrize("max_tokens", [None, 80])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
def test_inference_mode_may_be_on_in_some_calls(pool, name, max_tokens):
    assert pool.run(modes, name, max_tokens, ranks=2) == [[], []]
