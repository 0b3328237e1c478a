"""Context-parallel prefill: each rank runs the model on its own slots of the prompt only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import InputError, Unsupported
from .cache import TreeCache
from .calls import as_one_call
from .inputs import CACHE
from .layer_state import restore_on_error
from .models import INSTEAD, check_prefill, check_supported
from .rotary import check_switch, frequencies_of, switch_length
from .tensor_parallel import check_axes
from .window_layer import ReplicatedWindowLayer

CHUNK_TOKENS = {"cpu": 1024, "cuda": 32768}  # larger chunks are faster only because there are fewer
MASKED_CHUNK_TOKENS = 4096  # on a GPU, where a mask of the chunk's size is built


@as_one_call
@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    cache: TreeCache,
    *,
    attention_mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Read a prompt into `cache`, except its last tokens, for `model.generate(input_ids, cache=cache)`.

    Each rank computes projections, MLP and attention for its share of the tokens. The last 1 to `ranks * block_tokens`
    tokens are left for `generate`, which reads them on every rank. If an error interrupts it, the cache holds what it
    held before.

    Args:
        model: loaded with attn_implementation="tree_attention".
        input_ids: int64 `[B, tokens]`, the same on every rank: the whole text, including what the cache holds already.
        cache: new, or with earlier turns in it.
        attention_mask: `[B, tokens]`, 0 for left padding. Pass the same one to `generate`.
        chunk_tokens: tokens over all ranks per forward pass; bounds the memory for activations. Default: 1024 on CPUs,
            32768 on GPUs, or 4096 on GPUs with padding, windows or a soft cap, which need masks.
        on_progress: called after each chunk with the number of tokens in the cache.

    Raises:
        Unsupported: the model has layers with a state along the sequence (linear attention, convolution), or takes
            positions from elsewhere than `position_ids`; it was adapted by virtual tokens (PEFT); or `input_ids` stand
            for images, audio or video.
        InputError: `input_ids` has no more tokens than the cache, or more than a static cache can hold; or
            `chunk_tokens` is below 1.
    """
    model = without_adapters(model)
    _check(model, input_ids, cache, chunk_tokens)
    chunk_tokens = chunk_tokens or _default_chunk_tokens(input_ids, cache, attention_mask)
    cycle, done = cache.ranks.layout.cycle, cache.get_seq_length()
    cache.reserve(input_ids.shape[1])
    last = (input_ids.shape[1] - 1) // cycle * cycle
    if last <= done or last <= (switch_length(model) or 0) < input_ids.shape[1]:  # the model would drop such a cache
        return

    def read(columns: Tensor | slice, stop: int) -> None:
        mask = None if attention_mask is None else attention_mask[:, :stop]
        inputs = {"input_ids": input_ids[:, columns], "position_ids": positions[:, columns], "attention_mask": mask}
        model.base_model(**inputs, use_cache=True, **{CACHE: cache})
        if on_progress is not None:
            on_progress(stop)

    positions = _positions(input_ids, attention_mask)
    aligned = -(-done // cycle) * cycle
    step = max(chunk_tokens // cycle, 1) * cycle
    with restore_on_error(cache), frequencies_of(model.base_model, positions):
        if aligned > done:  # an earlier turn ended within a cycle: every rank reads the rest of that cycle
            read(slice(done, aligned), aligned)
        for start in range(aligned, last, step):
            stop = min(start + step, last)
            with cache.parallel_chunk(start, stop) as slots:
                read(slots.to(input_ids.device), stop)


def can_prefill(cache: TreeCache) -> bool:
    """Return whether `prefill` supports the model: each token's computation depends on others by attention alone."""
    return _obstacle(cache) is None


def _obstacle(cache: TreeCache) -> str | None:
    """What keeps a rank from being fed its own tokens only."""
    if kinds := {type(layer).__name__ for layer in cache.state_layers}:
        return f"{', '.join(sorted(kinds))}, which carries a state along the sequence"
    if getattr(cache.config, "attn_temperature_tuning", False):  # Llama 4
        return "attn_temperature_tuning, which counts positions from the cache's length"
    return None


def without_adapters(model: Any) -> Any:
    """The transformers model inside of a PEFT model, with the adapters that PEFT put into its layers."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise Unsupported(
            "context-parallel prefill would leave out the virtual tokens of this adapter (prompt learning): "
            "use model.generate(..., prefill_chunk_size=n)"
        )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check(model: Any, input_ids: Tensor, cache: Cache, chunk_tokens: int | None) -> None:
    if not isinstance(cache, TreeCache):
        raise InputError(f"cache must be a TreeCache, got {type(cache).__name__}")
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation != "tree_attention":
        raise InputError(f"model must be loaded with attn_implementation='tree_attention', got {implementation!r}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    shape, held = list(input_ids.shape), cache.get_seq_length()
    if len(shape) != 2 or shape[1] <= held:
        raise InputError(f"input_ids must be [B, tokens] with more tokens than the {held} in the cache, got {shape}")
    check_axes(model, cache.ranks.group)
    cache.check_ready(input_ids.shape[1])
    if obstacle := _obstacle(cache):
        raise Unsupported(f"context-parallel prefill cannot feed {obstacle}: {INSTEAD}")
    check_supported(model)
    check_prefill(model, input_ids)
    check_switch(model, held, shape[1], shape[1])


def _default_chunk_tokens(input_ids: Tensor, cache: TreeCache, attention_mask: Tensor | None) -> int:
    if input_ids.device.type == "cpu":
        return CHUNK_TOKENS["cpu"]
    capped = getattr(cache.config, "attn_logit_softcapping", None) is not None
    windows = any(isinstance(layer, ReplicatedWindowLayer) for layer in cache.layers)
    padded = attention_mask is not None and not bool(attention_mask.all())
    return MASKED_CHUNK_TOKENS if capped or windows or padded else CHUNK_TOKENS["cuda"]


def _positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position ids as `generate` counts them: real tokens only."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
