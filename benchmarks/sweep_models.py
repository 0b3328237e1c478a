"""A tiny random model of each causal language model type that the installed transformers has, from its own defaults."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 256
_SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input text_vocab_size",
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size "
    "output_embedding_size mamba_d_ssm lru_width attention_hidden_size linear_hidden_size out_hidden_size",
    96: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim dim_ff dff d_inner ffn_hidden_size n_inner "
    "intermediate_size_mlp shared_intermediate_size feed_forward_size dense_intermediate_size mlp_hidden_size",
    48: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads index_topk_blocks "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads heads_per_ngram linear_num_heads "
    "zero_expert_num num_codebooks",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k num_encoder_layers num_decoder_layers n_group n_groups "
    "linear_num_key_heads index_n_heads swa_num_key_value_heads num_expert_group mamba_n_groups depth num_blocks "
    "o_groups num_query_groups n_mamba_heads",
    16: "head_dim dim_head d_head swa_head_dim kv_lora_rank qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim index_head_dim attention_head_dim mamba_d_state state_size ssm_state_size mamba_d_head "
    "mamba_head_dim mamba_chunk_size chunk_size attention_chunk_size laurel_rank index_block_size kv_channels "
    "attention_head_size mamba_dt_rank time_step_rank hidden_size_per_layer_input adapter_rank o_lora_rank",
    24: "q_lora_rank qk_head_dim",
    12: "sliding_window local_attention sliding_window_size attention_window_size window_size v_head_dim "
    "keep_window_size",
    8: "qk_rope_head_dim rotary_dim index_topk mamba_n_heads mamba_num_heads",
    512: "max_position_embeddings n_positions max_seq_len n_ctx model_max_length max_target_positions context_length",
    1: "topk_group n_shared_experts first_k_dense_replace decoder_start_token_id",
}  # fmt: skip
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
ALWAYS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True}
KINDS = ("layer_types", "layers_block_type", "block_types")  # a list with each layer's kind
# What the defaults leave inconsistent once they are small.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 128,
    "attention_head_dim": 32,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "gemma3n_text": {
        "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4, "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "moshi": {"sliding_window": 512},  # its mask has no window
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32], "attn_layers": ["local", "local"]},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 24},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def model_types() -> list[str]:
    """All model types of the installed transformers that have a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    return AutoConfig.for_model(
        model_type, **_shrunk(CONFIG_MAPPING[model_type]().to_dict()) | SPECIAL.get(model_type, {})
    )


def tiny_model(model_type: str, attn_implementation: str) -> Any:
    """The model with random weights, sharper than usual, so that a wrong merge changes its logits."""
    config = tiny_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.isfinite().all() or weight.abs().max() > 1e4:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
            if weight.ndim > 1 and "conv" not in name:
                weight.mul_(3)
    return model.float().eval()


def _shrunk(default: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a configuration with these defaults small."""
    given: dict[str, Any] = {name: size for name, size in (SMALL | ALWAYS).items() if default.get(name) is not None}
    given |= {name: ALWAYS[name] for name in ALWAYS if name in default}
    given |= {name: SMALL[name] for name in ("head_dim", "num_key_value_heads") if name in default}
    if default.get("qk_rope_head_dim"):  # latent attention has as many keys as queries
        given |= {"head_dim": 8, "num_key_value_heads": 4}
    layers = next((default[name] for name in SMALL if SMALL[name] == 2 and "layer" in name and name in default), 0)
    kinds = next((default[name] for name in KINDS if default.get(name)), None)
    if kinds is not None and len(kinds) >= 2:  # one layer of each kind, and at least two
        chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        chosen = sorted(chosen if len(chosen) > 1 else [0, 1])
        per_layer = {name: each for name, each in default.items() if isinstance(each, list) and len(each) == len(kinds)}
        given |= {name: [each[at] for at in chosen] for name, each in per_layer.items()}
        given |= {
            name: len(chosen) for name in given if name in ("num_hidden_layers", "n_layer", "num_layers") and layers
        }
    for name, part in default.items():
        if isinstance(part, dict) and name.endswith("_config"):
            given[name] = _shrunk(part) | ({"model_type": part["model_type"]} if "model_type" in part else {})
    return given
