"""What `generate` needs: a TreeCache if the caller passes no cache, and the same random numbers on all ranks."""

from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed import ProcessGroup

from ..errors import Unsupported
from ..group import resolve_group
from .cache import CACHE, TreeCache
from .step import install_step
from .tensor_parallel import check_axes, sequence_axis, tensor_group

# With prefill_chunk_size, older versions feed the whole text to a cache that already holds a part of it.
FEEDS_AGAIN = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def prepare(model: Any, generation_config: Any, model_kwargs: Any, generation_mode: str, *_: Any, **__: Any) -> None:
    """Act before `GenerationMixin._prepare_cache_for_generation`, on models with "tree_attention"."""
    if model.config.get_text_config(decoder=True)._attn_implementation != "tree_attention":
        return
    cache, is_assisted = model_kwargs.get(CACHE), generation_mode == "assisted_generation"
    _check_supported(generation_config, cache, is_assisted)
    if cache is None and generation_config.use_cache is not False:
        cache = model_kwargs[CACHE] = TreeCache(model.config, sequence_axis(model))
    if isinstance(cache, TreeCache):
        check_axes(model, cache.ranks.group)
        lookup = generation_config.prompt_lookup_num_tokens if is_assisted else None
        # The last token is not fed. The token before it may be fed together with `lookup` guesses.
        cache.check_ready((generation_config.max_length or 0) - 2 + (lookup or 1))
        layers: list[Any] = cache.layers
        for layer in layers:
            if hasattr(layer, "record_past"):  # transformers never turns it off, and windows would grow without end
                layer.record_past = is_assisted or bool(generation_config.is_assistant)
        if cache.ranks.max_tokens is not None:
            cache.step_state.invalidate_cursor()  # the mask may hide other tokens than the last one did
            cache.disable_compile = bool(generation_config.disable_compile)
            install_step(model)
    if generation_config.do_sample:
        sequence = cache.ranks.group if isinstance(cache, TreeCache) else resolve_group()
        for group in (sequence, tensor_group(model)):
            if group is not None:
                share_random_state(group, model.device)


def _check_supported(generation_config: Any, cache: Any, is_assisted: bool) -> None:
    if generation_config.max_time is not None:
        raise Unsupported("max_time would stop the ranks at different tokens: use max_new_tokens")
    if generation_config.output_attentions:
        raise Unsupported("output_attentions=True is not supported: leave it out, or generate with 'eager' attention")
    if generation_config.cache_implementation is not None:
        raise Unsupported(
            f"cache_implementation={generation_config.cache_implementation!r} is not supported with tree_attention: "
            "leave it out, or pass past_key_values=TreeCache(model.config)"
        )
    if cache is None or not cache.get_seq_length():
        return
    if is_assisted:
        raise Unsupported(
            "transformers feeds a filled cache again in assisted decoding (prompt_lookup_num_tokens, assistant_model): "
            "leave that out, or pass a new TreeCache, without prefill"
        )
    if FEEDS_AGAIN and generation_config.prefill_chunk_size is not None:
        raise Unsupported(
            f"transformers {transformers.__version__} feeds a filled cache again when prefill_chunk_size is set: "
            "leave it out, or use tree_attention.hf.prefill"
        )


def share_random_state(group: ProcessGroup, device: torch.device) -> None:
    """Give every rank the first rank's generator state, so that equal logits draw equal tokens."""
    on_cuda = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if on_cuda else torch.get_rng_state()
    state = state.to(device)
    dist.broadcast(state, group=group, group_src=0)
    torch.cuda.set_rng_state(state.cpu(), device) if on_cuda else torch.set_rng_state(state)
