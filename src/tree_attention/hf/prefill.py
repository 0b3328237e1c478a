"""Context-parallel prefill: each rank runs the model on its own slots of the prompt only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import InputError, Unsupported
from .cache import WITH_KEYS, TreeCache
from .layers import ReplicatedWindowLayer
from .state import undone_on_error
from .tensor import check_axes

CHUNK_TOKENS = {"cpu": 1024, "cuda": 32768}  # where chunks cost time only by their number
MASKED_CHUNK_TOKENS = 4096  # where a mask of the chunk's size is made on a GPU


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
    """Read a prompt into `cache`, all but its last tokens, for `model.generate(input_ids, past_key_values=cache)`.

    Projections, MLP and attention are divided by the number of ranks. Left for `generate` are 1 to `cycle =
    ranks * block_tokens` tokens, which it reads on every rank alike. If an error ends it, the cache holds what it held
    before.

    Args:
        model: loaded with attn_implementation="tree_attention".
        input_ids: int64 `[B, tokens]`, the same on every rank: the whole text, with what the cache holds already.
        cache: new, or with earlier turns in it.
        attention_mask: `[B, tokens]`, 0 for left padding. Pass the same to `generate`.
        chunk_tokens: tokens, over all ranks, of one forward pass; bounds the memory for activations. By default 1024 on
            CPUs and 32768 on GPUs, or 4096 with padding, windows or a soft cap, which need masks.
        on_progress: called after each chunk with the number of tokens in the cache.

    Raises:
        Unsupported: a model with layers that carry a state along the sequence (linear attention, convolution).
        InputError: fewer tokens than the cache holds already, more than a static one has room for, or a chunk below one
            token.
    """
    _check(model, input_ids, cache, chunk_tokens)
    if chunk_tokens is None:
        chunk_tokens = _chunk_tokens(input_ids, cache, attention_mask)
    cycle, done = cache.placement.layout.cycle, cache.get_seq_length()
    cache.reserve(max(input_ids.shape[1], cache.placement.reserved))
    last = (input_ids.shape[1] - 1) // cycle * cycle
    if last <= done:
        return

    def read(columns: Tensor | slice, stop: int) -> None:
        model.base_model(
            input_ids=input_ids[:, columns],
            position_ids=positions[:, columns],
            attention_mask=None if attention_mask is None else attention_mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        if on_progress is not None:
            on_progress(stop)

    positions = _positions(input_ids, attention_mask)
    aligned = -(-done // cycle) * cycle
    with undone_on_error(cache):
        if aligned > done:  # an earlier turn ended within a cycle: fill that up on every rank alike
            read(slice(done, aligned), aligned)
        for start in range(aligned, last, max(chunk_tokens // cycle, 1) * cycle):
            stop = min(start + max(chunk_tokens // cycle, 1) * cycle, last)
            with cache.parallel_chunk(start, stop) as slots:
                read(slots.to(input_ids.device), stop)


def _chunk_tokens(input_ids: Tensor, cache: TreeCache, attention_mask: Tensor | None) -> int:
    if input_ids.device.type == "cpu":
        return CHUNK_TOKENS["cpu"]
    capped = getattr(cache.config, "attn_logit_softcapping", None) is not None
    windows = any(isinstance(layer, ReplicatedWindowLayer) for layer in cache.layers)
    padded = attention_mask is not None and not bool(attention_mask.all())
    return MASKED_CHUNK_TOKENS if capped or windows or padded else CHUNK_TOKENS["cuda"]


def can_prefill(cache: TreeCache) -> bool:
    """Whether `prefill` can feed every layer of this model: none carries a state along the sequence."""
    return all(_is_parallel(layer) for layer in cache.layers)


def _positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """As `generate` counts them: real tokens only."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _check(model: Any, input_ids: Tensor, cache: Cache, chunk_tokens: int | None) -> None:
    if not isinstance(cache, TreeCache):
        raise InputError(f"cache must be a TreeCache, got {type(cache).__name__}")
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation != "tree_attention":
        raise InputError(f"model must be loaded with attn_implementation='tree_attention', got {implementation!r}")
    check_axes(model, cache.placement.group)
    cache.check_whole()
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if input_ids.ndim != 2 or input_ids.shape[1] <= cache.get_seq_length():
        raise InputError(
            f"input_ids must be [B, tokens] with more tokens than the {cache.get_seq_length()} in the cache, "
            f"got {list(input_ids.shape)}"
        )
    cache.placement.check_room(input_ids.shape[1])
    if not can_prefill(cache):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers if not _is_parallel(layer)}))
        raise Unsupported(
            f"context-parallel prefill cannot feed {kinds}, which carries a state along the sequence: "
            "use model.generate(..., prefill_chunk_size=n), which reads the prompt on every rank alike"
        )


def _is_parallel(layer: Any) -> bool:
    return isinstance(layer, WITH_KEYS) or type(layer).__name__ == "DummyLayer"
