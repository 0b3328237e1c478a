"""`prefill`: keys or queries travel, and what is refused."""

from unittest import mock

import pytest
import torch
from transformers import DynamicCache

from architectures import TOKENS, assert_like_one_process, one_process, prompt, sharded, tiny
from tree_attention import InputError, Unsupported
from tree_attention.hf import TreeCache, can_prefill, prefill
from tree_attention.hf import prefill_attention as chunk
from tree_attention.hf.inputs import CACHE


def with_pass(group, name, which):
    """Run parallel prefill with one pass, or with choose_pass (None). Return also the passes that were chosen."""
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


@pytest.mark.slow
def test_prefill_of_linear_attention_is_refused():
    model = tiny("qwen3_next", "tree_attention")
    cache = TreeCache(model.config)
    assert not can_prefill(cache)
    with pytest.raises(Unsupported, match=r"cannot feed .*, which carries a state.*prefill_chunk_size=n"):
        prefill(model, prompt(False)[0], cache)


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
    llama(ids[:, :40], **{CACHE: cache})
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
