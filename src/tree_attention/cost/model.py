"""The sizes of a model from its Hugging Face `config.json`: weights, KV bytes per token, FLOPs per token."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).with_name("models")
NESTED = ("text_config", "llm_config", "language_config")  # the language model's section in multimodal configs
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a model that decide what a decode step reads and computes.

    head_dim, head_dim_v: dimensions in the cache. With MLA (`latent`): those of the latent head that all heads share.
    prefill_dims: D + D_v of a head in prefill; with MLA, after the latents are expanded. windows: one entry per layer:
    None (full attention), the size of its window in tokens, or 0 (no keys). `*_weights`: numbers of parameters, without
    biases. dense: read for every token, including the output head. embedding: the embedding table, 0 if it is tied to
    the output head. expert: those of one routed expert. notes: the assumptions made.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    prefill_dims: int
    latent: bool
    windows: tuple[int | None, ...]
    vocabulary: int
    dense_weights: float
    embedding_weights: float
    expert_weights: float
    expert_layers: int
    experts: int
    experts_per_token: int
    weight_bytes: float
    kv_itemsize: float
    most_positions: int | None
    notes: tuple[str, ...]

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def weights(self) -> float:
        return self.dense_weights + self.embedding_weights + self.expert_layers * self.experts * self.expert_weights

    @property
    def weights_bytes(self) -> float:
        return self.weights * self.weight_bytes

    def can_split(self, tensor: int) -> bool:
        """True if `load_tensor_parallel` can split the model over `tensor` ranks, with whole KV heads on each."""
        return self.heads % tensor == 0 and (self.latent or self.kv_heads % tensor == 0)

    @property
    def key_bytes(self) -> float:
        """KV bytes per token and layer, over all KV heads."""
        return self.kv_heads * (self.head_dim if self.latent else self.head_dim + self.head_dim_v) * self.kv_itemsize

    @property
    def flops_per_token(self) -> float:
        """FLOPs per token of the products with weights: two per weight that the token uses."""
        routed = self.expert_layers * self.experts_per_token * self.expert_weights
        return 2 * (self.dense_weights + routed)

    def read_bytes(self, tokens: int) -> float:
        """Bytes of the weights that `tokens` tokens use: E (1 - (1 - k / E)^tokens) of E equally likely experts."""
        met = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens) if self.experts else 0.0
        return (self.dense_weights + self.expert_layers * met * self.expert_weights) * self.weight_bytes

    def held_tokens(self, context: int) -> list[int]:
        """Number of tokens whose keys each layer keeps, one number per layer."""
        return [context if window is None else min(window, context) for window in self.windows]


def preset_names() -> list[str]:
    """Names of the models that are built in."""
    return sorted(file.stem for file in PRESETS.glob("*.json"))


def load_model_spec(name: str) -> ModelSpec:
    """Return the model of a preset name, a `config.json`, or a folder that holds one.

    Raises ValueError if `name` is none of these, the file is not a JSON object, or the model has no attention.
    """
    file = Path(name)
    if name.lower() in preset_names():
        file = PRESETS / f"{name.lower()}.json"
    elif file.is_dir():
        file /= "config.json"
    if not file.is_file():
        known = ", ".join(preset_names())
        raise ValueError(f"model must be one of {known}, a config.json or a folder that holds one, got {name!r}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be a JSON document: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return parse_config(config, file.parent.name if file.name == "config.json" else file.stem)


def parse_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Return the model that a configuration describes: layers of attention and a gated MLP (three matrices) or experts.

    Raises ValueError if the number or the width of layers or heads is missing or invalid.
    """
    text = next((config[key] for key in NESTED if isinstance(config.get(key), dict)), {})
    fields = {**config, **{key: value for key, value in text.items() if value is not None}}
    absent = [key for key in REQUIRED if not fields.get(key)]
    if absent:
        raise ValueError(f"{name} is not the configuration of a model with attention: {', '.join(absent)} missing")
    notes: list[str] = []
    hidden, layers, heads = (_count(fields, key) for key in REQUIRED)
    attention, cached = _attention(fields, hidden, heads)
    if fields.get("kv_lora_rank"):
        notes.append(
            "MLA: counted for an engine that attends to the latents directly. transformers, and therefore TreeCache, "
            "expands them to the keys and values of all heads in each layer and step, which takes many times as long"
        )
    windows = _windows(fields, layers)
    if 0 in windows:
        notes.append(
            "layers without keys (linear attention): their state is not counted, their weights are counted as attention"
        )
    expert_layers, experts, per_token, width, shared_width = _experts(fields, layers)
    dense_width = fields.get("intermediate_size") or width
    if not dense_width:
        raise ValueError(f"{name} does not give the width of its MLP: intermediate_size missing")
    vocabulary = _count(fields, "vocab_size")
    dense = layers * (attention + 2 * hidden) + hidden + (layers - expert_layers) * 3 * hidden * dense_width
    dense += expert_layers * hidden * (experts + 3 * shared_width) + vocabulary * hidden
    tied = fields.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    itemsize = BYTES.get(str(fields.get("dtype") or fields.get("torch_dtype")), 2)
    weights = (dense, 0.0 if tied else vocabulary * hidden, 3.0 * hidden * width, expert_layers, experts, per_token)
    weight_bytes, positions = _weight_bytes(fields, itemsize, notes), fields.get("max_position_embeddings")
    rest = (vocabulary, *weights, weight_bytes, itemsize, positions, tuple(notes))
    return ModelSpec(name, hidden, heads, *cached, windows, *rest)


def _count(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be an integer of at least 1, got {value!r}")
    return value


def _attention(fields: Mapping[str, Any], hidden: int, heads: int) -> tuple[int, tuple[int, int, int, int, bool]]:
    """Weights of a layer's attention; kv_heads, head_dim, head_dim_v, prefill_dims and latent of ModelSpec."""
    rank = fields.get("kv_lora_rank")
    if rank:
        nope, rope, v = (_count(fields, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        q_rank = fields.get("q_lora_rank")
        queries = q_rank * (hidden + heads * (nope + rope)) if q_rank else hidden * heads * (nope + rope)
        keys = hidden * (rank + rope) + rank * heads * (nope + v)
        return queries + keys + heads * v * hidden, (1, rank + rope, rank, nope + rope + v, True)
    kv_heads = _count(fields, "num_key_value_heads") if fields.get("num_key_value_heads") else heads
    head_dim = fields.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    return 2 * hidden * head_dim * (heads + kv_heads), (kv_heads, head_dim, head_dim, 2 * head_dim, False)


def _windows(fields: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of each layer: from `layer_types`, else `sliding_window_pattern` or `max_window_layers`."""
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    types = fields.get("layer_types")
    if types is not None:
        if len(types) != layers:
            raise ValueError(f"layer_types must name each of {layers} layers, got {len(types)}")
        sizes = {"sliding_attention": window, "chunked_attention": fields.get("attention_chunk_size")}
        sizes["full_attention"] = None
        return tuple(sizes.get(kind, 0) for kind in types)
    if window is None:
        return (None,) * layers
    pattern = fields.get("sliding_window_pattern")
    first = fields.get("max_window_layers", 0) if fields.get("use_sliding_window") else 0
    return tuple(None if i < first or (pattern and (i + 1) % pattern == 0) else window for i in range(layers))


def _experts(fields: Mapping[str, Any], layers: int) -> tuple[int, int, int, int, int]:
    """Layers with experts, experts per layer, experts per token, width of an expert, width of the shared experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((fields[name] for name in names if fields.get(name)), 0)
    if experts < 2:
        return 0, 0, 0, 0, 0
    width = fields.get("moe_intermediate_size") or _count(fields, "intermediate_size")
    shared = fields.get("shared_expert_intermediate_size") or (fields.get("n_shared_experts") or 0) * width
    first, step = fields.get("first_k_dense_replace", 0), fields.get("decoder_sparse_step", 1)
    step = fields.get("interleave_moe_layer_step", step)
    dense = set(fields.get("mlp_only_layers") or ())
    count = sum(i >= first and (i + 1) % step == 0 and i not in dense for i in range(layers))
    return count, experts, _count(fields, "num_experts_per_tok"), width, shared


def _weight_bytes(fields: Mapping[str, Any], itemsize: int, notes: list[str]) -> float:
    """Bytes per stored weight."""
    quantization = fields.get("quantization_config")
    if not quantization:
        return itemsize
    method = quantization.get("quant_method")
    bits = quantization.get("bits") or {"fp8": 8, "mxfp4": 4.25}.get(method)
    notes.append(f"all weights counted with {bits} bits" if bits else f"weights in {method!r} counted as not quantized")
    return bits / 8 if bits else itemsize
