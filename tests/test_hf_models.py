"""Models that hide something from a cache: exact all the same, or refused before anything is computed."""

import contextlib
import copy
import functools
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig

from architectures import (
    BLOCK,
    COMMON,
    GREEDY,
    LATENT,
    TOKENS,
    assert_like_one_process,
    one_process,
    prompt,
    sharded,
    tiny,
)
from tree_attention import TreeAttentionError, Unsupported
from tree_attention.hf import TreeCache, can_prefill, prefill
from tree_attention.hf.inputs import CACHE
from tree_attention.hf.layer_state import copy_cache, restore_on_error
from tree_attention.hf.mask import lazy_mask
from tree_attention.hf.save import load_cache, save_cache
from tree_attention.testing import record_traffic

OTHERWISE = "load this model with another attn_implementation"
SCORES = torch.zeros(1, 1, 2, 3)


@pytest.mark.parametrize(
    "look",
    [
        lambda mask: mask.shape,
        lambda mask: mask.dtype,
        lambda mask: mask.size(-1),
        lambda mask: mask.any(),
        lambda mask: mask + SCORES,
        lambda mask: SCORES + mask,
        lambda mask: 1.0 - mask,
        lambda mask: mask * -1e9,
        lambda mask: ~mask,
        lambda mask: mask == 0,
        lambda mask: mask > 0,
        lambda mask: SCORES.masked_fill(mask, 0),
        lambda mask: torch.where(mask, SCORES, 0),
        lambda mask: torch.cat([SCORES, mask], -1),
        lambda mask: nn.functional.pad(mask, (0, 1)),
        lambda mask: mask[:, :, :, :3],
        lambda mask: mask[0],
        lambda mask: mask[:, :, -1],
        lambda mask: mask[:, :, -4:, :][:, :, -2:, :],
        lambda mask: list(mask),
        lambda mask: len(mask),
        lambda mask: bool(mask),
        lambda mask: mask.__setitem__(0, 1),
    ],
)
def test_a_model_that_looks_at_its_mask_is_refused(look):
    with pytest.raises(Unsupported, match=rf"looks at its attention mask .* {OTHERWISE}"):
        look(lazy_mask())


def test_libraries_that_look_for_tensors_find_none():
    mask = lazy_mask()
    assert not hasattr(mask, "shape")
    assert copy.copy(mask).rule is mask.rule
    assert mask.to("cpu") is mask
    assert mask[:, :, -2:, :].rows == slice(-2, None)


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("deepseek_v32", {**LATENT, "index_n_heads": 2, "index_head_dim": 16}, "DynamicIndexedLayer"),
        ("deepseek_v4", {"num_key_value_heads": 1}, "layers of the kind DeepseekV4"),
        ("bloom", {}, "bloom computes attention itself"),
        ("doge", {}, "doge looks at its attention mask"),
    ],
)
def test_a_cache_for_attention_of_another_kind_is_refused(name, given, text):
    config = AutoConfig.for_model(name, **{**COMMON, **given})
    AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # what there is of it is known from its code
    with record_traffic() as calls, pytest.raises(Unsupported, match=f"{text}.*{OTHERWISE}"):
        TreeCache(config)
    assert not calls


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon"])
def test_such_a_model_is_refused_when_it_is_loaded(name):
    config = AutoConfig.for_model(name, vocab_size=64, hidden_size=32, n_embd=32, n_head=2, n_layer=1, rotary_dim=8)
    with pytest.raises(Unsupported, match=f"{name} computes attention itself.*{OTHERWISE}"):
        AutoModelForCausalLM.from_config(config, attn_implementation="tree_attention")


@pytest.mark.slow
def test_a_model_with_a_cache_of_its_own_runs_as_without_us():
    def minimax(attn_implementation):
        torch.manual_seed(0)
        config = AutoConfig.for_model("minimax", **COMMON, num_local_experts=2, block_size=8)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()

    ids, mask = prompt(False)
    model, out = minimax("tree_attention"), minimax("eager").generate(ids, attention_mask=mask, **GREEDY)
    ours = model.generate(ids, attention_mask=mask, **GREEDY)
    assert_like_one_process([(ours.sequences, torch.stack(ours.logits))], out.sequences, torch.stack(out.logits))
    with pytest.raises(Unsupported, match="minimax has a cache of its own: call generate without cache"):
        model.generate(ids, attention_mask=mask, cache=TreeCache(model.config), **GREEDY)


@pytest.mark.parametrize("padded", [False, True])
def test_chunked_attention_of_a_static_cache(pool, padded):
    """Its rule depends on the padding, which a step by the cursor does not see."""
    results = pool.run(sharded, "llama4_text", padded, "replicated", True, ranks=2)
    assert_like_one_process(results, *one_process("llama4_text", padded))


def test_positions_from_the_caches_length_are_refused_in_prefill():
    model, ids = tiny("llama4_text", "tree_attention"), prompt(False)[0]
    cache = TreeCache(model.config, block_tokens=BLOCK)
    assert not can_prefill(cache)
    with pytest.raises(Unsupported, match=r"cannot feed attn_temperature_tuning.*prefill_chunk_size=n"):
        prefill(model, ids, cache)


def test_a_model_that_asks_for_the_caches_length_in_prefill_is_refused(llama):
    class Body(nn.Module):
        def forward(self, input_ids, position_ids=None, **given):
            torch.arange(input_ids.shape[1]) + given[CACHE].get_seq_length()

    model, cache = stand_in(llama, Body()), TreeCache(llama.config)
    with pytest.raises(Unsupported, match=r"computes with the cache's length.*prefill_chunk_size=n"):
        prefill(model, prompt(False)[0], cache)
    assert cache.get_seq_length() == 0


def test_a_model_without_position_ids_is_refused_in_prefill(llama):
    class Body(nn.Module):
        def forward(self, input_ids, **given):
            raise AssertionError

    with pytest.raises(Unsupported, match=r"needs position_ids, which Body does not take.*prefill_chunk_size=n"):
        prefill(stand_in(llama, Body()), prompt(False)[0], TreeCache(llama.config))


def stand_in(model, body):
    return SimpleNamespace(config=model.config, base_model=body)


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model("bart", vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="tree_attention").eval()
    with pytest.raises(Unsupported, match=f"bart is an encoder-decoder model, which is not supported: {OTHERWISE}"):
        model.generate(prompt(False)[0] % 64, max_new_tokens=2)


@pytest.mark.parametrize("name", ["image_token_id", "video_token_index", "audio_token_id", "image_pad_token_id"])
def test_a_text_with_images_is_refused_in_prefill(llama, name):
    model, ids = copy.copy(llama), prompt(False)[0]
    model.config = copy.deepcopy(llama.config)
    setattr(model.config, name, int(ids[1, 40]))
    with pytest.raises(Unsupported, match=rf"reads text only, got {name} {ids[1, 40]} in input_ids"):
        prefill(model, ids, TreeCache(llama.config))
    setattr(model.config, name, 300)
    prefill(model, ids, TreeCache(llama.config))


def with_adapter(implementation, **how):
    """A Llama with random weights as PEFT wraps it: LoRA in its layers, or prompt learning around it."""
    import peft

    if "num_virtual_tokens" in how:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", **how)
    else:
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **how)
    model = tiny("llama", implementation, 2)
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):  # PEFT calls what transformers renamed
        return peft.get_peft_model(model, config).eval()


def adapted(group, folder):
    folder = Path(folder)
    ids, model = prompt(False)[0], with_adapter("tree_attention", r=4)
    new = functools.partial(TreeCache, model.config, group, block_tokens=BLOCK)
    cache = new()
    prefill(model, ids, cache)
    save_cache(cache, folder, model, {})
    results = [model.generate(input_ids=ids, **{CACHE: cache}, **GREEDY).sequences]
    others = with_adapter("tree_attention", r=4, lora_alpha=32), with_adapter("tree_attention", num_virtual_tokens=4)
    results.append(others[1].generate(input_ids=ids, **{CACHE: new()}, **GREEDY).sequences)
    for call in (
        lambda: load_cache(new(), folder, others[0]),
        lambda: prefill(others[1], ids, new()),
        lambda: (model, others[0])[group.rank()].generate(input_ids=ids, **{CACHE: new()}, **GREEDY),
    ):
        with pytest.raises(TreeAttentionError) as refused:
            call()
        results.append(str(refused.value))
    return results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_adapters_of_peft(pool, tmp_path):
    ids = prompt(False)[0]
    expected = [
        with_adapter("eager", **how).generate(input_ids=ids, **GREEDY).sequences
        for how in ({"r": 4}, {"num_virtual_tokens": 4})
    ]
    for *written, loaded, read, differ in pool.run(adapted, str(tmp_path), ranks=2):
        assert all(map(torch.equal, written, expected))
        assert "adapters" in loaded
        assert "would leave out the virtual tokens of this adapter" in read
        assert "adapters must be the same on every rank" in differ


@pytest.mark.parametrize("name", ["phi3", "qwen2 dynamic"])
def test_prefill_with_frequencies_that_follow_the_length(pool, name):
    results = pool.run(sharded, name, True, "parallel", ranks=2)
    assert_like_one_process(results, *one_process(name, True))


def test_a_cache_that_the_model_would_drop_is_refused():
    """Phi-3's code drops a cache of at most 40 tokens once the text is longer."""
    model, ids = tiny("phi3", "tree_attention"), prompt(False)[0]
    how = {CACHE: TreeCache(model.config, block_tokens=BLOCK)} | GREEDY
    with pytest.raises(Unsupported, match="beyond 40 tokens this model drops its cache"):
        model.generate(ids[:, :35], **how)  # the answer goes beyond
    out = model.generate(ids[:, :30], **how | {"max_new_tokens": 8})
    with pytest.raises(Unsupported, match="the cache holds 37, 61 are to be read, 73 with the answer"):
        model.generate(torch.cat([out.sequences, ids[:, 38:]], 1), **how)
    with pytest.raises(Unsupported, match="the cache holds 37, 61 are to be read, 61 with the answer"):
        prefill(model, torch.cat([out.sequences, ids[:, 38:]], 1), how[CACHE])
    assert how[CACHE].get_seq_length() == 37
    how[CACHE].reset()
    prefill(model, ids[:, :41], how[CACHE])
    out = model.generate(ids[:, :41], **how)
    assert out[CACHE] is how[CACHE]
    assert how[CACHE].get_seq_length() == 41 + GREEDY["max_new_tokens"] - 1


def with_layers_that_are_not_fed(group, static):
    """A configuration may have more layers than the decoder, such as those of an encoder."""
    ids, mask = prompt(False)
    model = tiny("llama", "tree_attention")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 6, None
    cache = TreeCache(config, group, block_tokens=BLOCK, max_tokens=80 if static else None)
    model.generate(ids[:, :40], attention_mask=mask[:, :40], cache=cache, **GREEDY | {"max_new_tokens": 2})
    cache.crop(-1)
    out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    assert bool(cache.captured_steps) == static
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("static", [False, True])
def test_layers_that_a_model_never_feeds(pool, static):
    assert_like_one_process(pool.run(with_layers_that_are_not_fed, static, ranks=2), *one_process("llama", False))


@pytest.mark.parametrize("static", [False, True])
def test_attention_beside_linear_attention(pool, static):
    results = pool.run(sharded, "falcon_h1", True, "replicated", static, ranks=2)
    assert_like_one_process(results, *one_process("falcon_h1", True))


def hybrid_cache(group, ids):
    model = tiny("falcon_h1", "tree_attention" if group else "eager", layers=2)
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    return model, cache


def continue_in_other_ways(group):
    """Undo, copy, repeat rows, reset: what the next token's logits are after each."""
    ids, results = prompt(False)[0], []
    model, cache = hybrid_cache(group, ids[:1, :50])
    copied = copy_cache(cache)
    copied.batch_repeat_interleave(3)
    copied.batch_select_indices(torch.tensor([2, 0]))
    again = torch.cat([ids[:1, 50:], ids[:1, 50:]])
    with torch.no_grad():
        with contextlib.suppress(KeyboardInterrupt), restore_on_error(cache):
            model(again[:1], **{CACHE: cache})
            raise KeyboardInterrupt
        results.append(model(again, **{CACHE: copied}).logits[:1])
        results.append(model(ids[:1, 50:], **{CACHE: cache}).logits)
        with pytest.raises(Unsupported, match="HybridLayer cannot forget tokens"):
            cache.crop(-1)
        cache.reset()
        results.append(model(ids[:1], **{CACHE: cache}).logits[:, 50:])
    return results, sum(layer.keys[:, :, : layer.held].shape[2] for layer in cache.layers)


def test_what_a_hybrid_layer_holds_is_copied_repeated_and_reset(pool):
    ids = prompt(False)[0]
    model, cache = hybrid_cache(None, ids[:1, :50])
    with torch.no_grad():
        logits = model(ids[:1, 50:], **{CACHE: cache}).logits
    ranks = pool.run(continue_in_other_ways, ranks=2)
    for results, _ in ranks:
        for result in results:
            torch.testing.assert_close(result, logits, atol=1e-5, rtol=0)
    assert sum(held for _, held in ranks) == 2 * TOKENS


def save_hybrid(group, folder):
    model, cache = hybrid_cache(group, prompt(False)[0][:1, :50])
    save_cache(cache, folder, model, {})


def load_hybrid(group, folder):
    model = tiny("falcon_h1", "tree_attention", layers=2)
    cache = TreeCache(model.config, group)
    load_cache(cache, folder, model)
    with torch.no_grad():
        return model(prompt(False)[0][:1, 50:], **{CACHE: cache}).logits


def test_a_save_of_hybrid_layers_on_another_number_of_ranks(pool, tmp_path):
    pool.run(save_hybrid, tmp_path, ranks=3)
    model, cache = hybrid_cache(None, prompt(False)[0][:1, :50])
    with torch.no_grad():
        logits = model(prompt(False)[0][:1, 50:], **{CACHE: cache}).logits
    for result in pool.run(load_hybrid, tmp_path, ranks=2):
        torch.testing.assert_close(result, logits, atol=1e-5, rtol=0)


def test_beams_of_a_hybrid(pool):
    (want,) = {tuple(map(tuple, beams(None)))}
    assert [tuple(map(tuple, got)) for got in pool.run(beams, ranks=2)] == [want, want]


def beams(group):
    ids, mask = prompt(True)
    model = tiny("falcon_h1", "tree_attention" if group else "eager", layers=2)
    cache = TreeCache(model.config, group, block_tokens=BLOCK) if group else DynamicCache(config=model.config)
    how = GenerationConfig(num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, cache=cache, generation_config=how).tolist()


def test_a_model_type_that_was_never_compared_is_named_once(caplog):
    config = copy.deepcopy(tiny("llama", "tree_attention", layers=2).config)
    config.model_type = "unheard_of"
    for _ in range(2):
        TreeCache(config)
    TreeCache(tiny("qwen3", "tree_attention", layers=2).config)
    (message,) = [record.getMessage() for record in caplog.records if "compared" in record.getMessage()]
    assert "models of type unheard_of: tree_attention.hf.check_model(model) compares them here" in message
