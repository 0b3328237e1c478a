"""Masks that the caller passes: what they hide, and what is refused."""

import pytest
import torch
from transformers import DynamicCache

from architectures import BLOCK, HEADS, TOKENS, assert_like_one_process, prompt, tiny
from tree_attention import TreeAttentionError, Unsupported
from tree_attention.hf import TreeCache
from tree_attention.hf.inputs import CACHE


def with_mask_by_hand(group, name):
    """Pass a 4-D mask to the prompt and to a step: bidirectional in the first 20 slots, then causal, with holes."""
    ids, _ = prompt(False)
    q_slot, k_slot = torch.arange(TOKENS + 1)[:, None], torch.arange(TOKENS + 1)[None, :]
    visible = torch.rand(2, 1, TOKENS + 1, TOKENS + 1, generator=torch.Generator().manual_seed(2)) < 0.7
    visible = visible & ((k_slot <= q_slot) | ((k_slot < 20) & (q_slot < 20))) | (k_slot == q_slot)
    if group is None:  # eager attention adds its mask
        visible = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = tiny(name, "tree_attention" if group else "eager")
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids, attention_mask=visible[:, :, :TOKENS, :TOKENS], **{CACHE: cache}).logits
        tokens = logits[:, -1:].argmax(-1)
        step = model(tokens, attention_mask=visible[:, :, TOKENS:], **{CACHE: cache}).logits
    return tokens, torch.cat([logits, step], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_bool_mask_of_four_dimensions(pool, name):
    assert_like_one_process(pool.run(with_mask_by_hand, name, ranks=3), *with_mask_by_hand(None, name))


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_masks_that_are_refused(llama, cached):
    how = {CACHE: TreeCache(llama.config)} if cached else {"use_cache": False}
    with pytest.raises(Unsupported, match=r"4-D attention_mask must be bool .*, got torch.float32: pass mask >= 0"):
        llama(prompt(False)[0], attention_mask=torch.zeros(2, 1, TOKENS, TOKENS), **how)


@pytest.mark.slow
def test_a_mask_by_head_is_refused(llama):
    mask = torch.ones(2, HEADS, TOKENS, TOKENS, dtype=torch.bool).tril()
    mask[:, 1, :, 1:30] = False
    with pytest.raises(TreeAttentionError, match="mask"):
        llama(prompt(False)[0], attention_mask=mask, **{CACHE: TreeCache(llama.config)})


@pytest.mark.slow
def test_a_mask_over_more_than_a_window_is_refused():
    """transformers' own attention raises here too: a window's keys are the last 12 slots, not the first."""
    model = tiny("gemma2", "tree_attention")
    cache = TreeCache(model.config)
    model(prompt(False)[0], **{CACHE: cache})
    with pytest.raises(TreeAttentionError, match="mask"):
        model(torch.ones(2, 1, dtype=torch.long), attention_mask=torch.ones(2, 1, 1, 62).bool(), **{CACHE: cache})
