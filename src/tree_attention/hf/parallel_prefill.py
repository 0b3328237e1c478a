"""Context-parallel prefill: each rank runs the model on its own slots of the prompt only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import InputError, Unsupported
from .cache import CACHE, TreeCache
from .layer_state import restore_on_error
from .tensor_parallel import check_axes
from .window_layer import ReplicatedWindowLayer

CHUNK_TOKENS = {"cpu": 1024, "cuda": 32768}  # larger chunks are faster only because there are fewer
MASKED_CHUNK_TOKENS = 4096  # on a GPU, where a mask of the chunk's size is built


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
    """Read a prompt into `cache`, except its last tokens, for `model.generate(input_ids, past_key_values=cache)`.

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
        Unsupported: the model has layers with a state along the sequence (linear attention, convolution).
        InputError: `input_ids` has no more tokens than the cache, or more than a static cache can hold; or
            `chunk_tokens` is below 1.
    """
    _check(model, input_ids, cache, chunk_tokens)
    chunk_tokens = chunk_tokens or _default_chunk_tokens(input_ids, cache, attention_mask)
    cycle, done = cache.ranks.layout.cycle, cache.get_seq_length()
    cache.reserve(input_ids.shape[1])
    last = (input_ids.shape[1] - 1) // cycle * cycle
    if last <= done:
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
    with restore_on_error(cache):
        if aligned > done:  # an earlier turn ended within a cycle: every rank reads the rest of that cycle
            read(slice(done, aligned), aligned)
        for start in range(aligned, last, step):
            stop = min(start + step, last)
            with cache.parallel_chunk(start, stop) as slots:
                read(slots.to(input_ids.device), stop)


def can_prefill(cache: TreeCache) -> bool:
    """Return whether `prefill` supports the model: no layer carries a state along the sequence."""
    return cache.other_kinds <= {"DummyLayer"}


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
    if not can_prefill(cache):
        kinds = ", ".join(sorted(cache.other_kinds - {"DummyLayer"}))
        raise Unsupported(
            f"context-parallel prefill cannot feed {kinds}, which carries a state along the sequence: "
            "use model.generate(..., prefill_chunk_size=n), which reads the prompt on every rank alike"
        )


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
