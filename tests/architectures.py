"""Small models of the architectures we support, and how far a sharded cache moves their logits from one process's.

    python tests/architectures.py            one JSON line for each architecture x number of ranks x way of reading

Weights are random, but with sharper attention than usual, so that a wrong merge changes tokens.
"""

import functools
import itertools
import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from tree_attention.hf import TreeCache, prefill
from tree_attention.hf.inputs import CACHE, VERSION
from tree_attention.testing import RankPool

COMMON = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "head_dim": 8, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "n_routed_experts": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_experts": 4, "shared_expert_intermediate_size": 48, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "factor": 8.0,
    "long_factor": [1.0 + 0.7 * i for i in range(8)], "original_max_position_embeddings": 40,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 12},
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 16},
    "gpt_oss": {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "qwen3_next": {**EXPERTS, **LINEAR},
    "falcon_h1": MAMBA,
    "llama4_text": {
        "attention_chunk_size": 16, "no_rope_layers": [1, 0] * 2, "num_local_experts": 4, "floor_scale": 8,
        "intermediate_size_mlp": 96,
    },
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 40, "sliding_window": None},
    "qwen2 dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 40},
}  # fmt: skip
# The others are read replicated, in chunks and in parallel. Frequencies that follow the length follow a chunk's.
READINGS = {
    **dict.fromkeys(["qwen3_next", "falcon_h1", "llama4_text"], ("replicated", "chunked")),
    **dict.fromkeys(["phi3", "qwen2 dynamic"], ("replicated", "parallel")),
}
TOKENS, NEW_TOKENS, BLOCK = 61, 12, 4
ROWS, HEADS = 2, 4
# sharded layers, D_v + 1
RESULTS_OF_A_STEP = {"llama": (4, 17), "gemma2": (2, 17), "deepseek_v3": (4, 13), "qwen3_next": (2, 17)}
# Relative to the largest logit. Measured over all architectures, ranks and ways of reading: at most 7.4e-7; a rank that
# is left out, or merged with a wrong weight, gives 1e-2 and more.
TOLERANCE = 2e-5
OLD = VERSION < (5, 23)


def tiny(name, attn_implementation, layers=4):
    """A model with random weights; two layers have one of each kind, for tests whose time goes into compiling."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name.split()[0], **{**COMMON, **ARCHITECTURES[name], **_of_layers(name, layers)}
    )
    config._attn_implementation = attn_implementation
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.isfinite().all():  # some experts are left as they were allocated
                weight.normal_(0, 0.02)
            if weight.ndim > 1:
                weight.mul_(3)
    return model


def _of_layers(name, layers):
    types = ARCHITECTURES[name].get("layer_types")
    return {"num_hidden_layers": layers} | ({"layer_types": types[:layers]} if types else {})


def prompt(padded):
    """Two rows; the second starts with padding if asked."""
    ids = torch.randint(3, 256, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9], ids[1, :9] = 0, 0
    return ids, mask


GREEDY = {
    "max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    "eos_token_id": None,
}  # fmt: skip


@functools.cache
def one_process(name, padded, layers=4):
    """Tokens and logits `[new, B, vocab]` of eager attention with transformers' own cache."""
    ids, mask = prompt(padded)
    model = tiny(name, "eager", layers)
    out = model.generate(ids, attention_mask=mask, **{CACHE: DynamicCache(config=model.config)}, **GREEDY)
    return out.sequences, torch.stack(out.logits)


def sharded(group, name, padded, reading, static=False, step="captured", layers=4):
    """The same with a TreeCache; reading is "replicated", "chunked" or "parallel"."""
    ids, mask = prompt(padded)
    model = tiny(name, "tree_attention", layers)
    max_tokens = TOKENS + NEW_TOKENS - 1 if static else None  # the last token is not fed
    cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens, step=step)
    how = {"prefill_chunk_size": 16} if reading == "chunked" else {}
    if reading == "parallel":
        prefill(model, ids, cache, attention_mask=mask if padded else None, chunk_tokens=24)
    out = model.generate(ids, attention_mask=mask, cache=cache, **how, **GREEDY)
    steps = static and not (padded and name == "llama4_text")
    assert bool(cache.captured_steps) == steps  # whether tokens were fed by the cursor
    assert cache.get_seq_length() == TOKENS + NEW_TOKENS - 1
    return out.sequences, torch.stack(out.logits)


def readings(name):
    return READINGS.get(name, ("replicated", "chunked", "parallel"))


def assert_like_one_process(results, tokens, logits):
    """results: (tokens, logits) of each rank."""
    assert torch.isfinite(logits).all()
    for its_tokens, its_logits in results:
        assert torch.equal(its_tokens, tokens)
        assert torch.equal(its_logits, results[0][1])
    assert (results[0][1] - logits).abs().max() <= TOLERANCE * logits.abs().max()


def break_off(model, layer, turn):
    """Interrupt forward pass number `turn` in a layer, after its attention, as Ctrl-C would."""

    def interrupt(*_):
        if next(turns) == turn:
            hook.remove()
            raise KeyboardInterrupt

    turns = itertools.count(1)
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)


def main():
    transformers.logging.set_verbosity_error()
    pool = RankPool(4)
    for name in sys.argv[1:] or ARCHITECTURES:
        for padded in (False, True):
            tokens, logits = one_process(name, padded)
            for ranks in (1, 2, 3, 4):
                for reading in readings(name):
                    results = pool.run(sharded, name, padded, reading, ranks=ranks)
                    line = {
                        "architecture": name, "transformers": transformers.__version__, "torch": torch.__version__,
                        "ranks": ranks, "reading": reading, "padded": padded,
                        "same_tokens": all(torch.equal(t, tokens) for t, _ in results),
                        "same_bits_on_all_ranks": all(torch.equal(l, results[0][1]) for _, l in results),
                        "max_logit_difference": float((results[0][1] - logits).abs().max()),
                        "largest_logit": float(logits.abs().max()),
                    }  # fmt: skip
                    print(json.dumps(line), flush=True)  # noqa: T201
    pool.close()


if __name__ == "__main__":
    main()
