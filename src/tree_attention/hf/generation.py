"""What `generate` needs from us: a TreeCache where the caller passes none, and random numbers that agree.

transformers has no registry of caches, so one private method is wrapped. It acts on models with
attn_implementation="tree_attention" alone.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed import ProcessGroup
from transformers import GenerationMixin

from ..errors import Unsupported
from ..group import resolve_group
from .cache import TreeCache
from .step import install_step
from .tensor import check_axes, sequence_axis, tensor_group

# whether prefill_chunk_size feeds the whole text to a filled cache
FEEDS_AGAIN = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def install_generation_hook() -> None:
    """Wrap `GenerationMixin._prepare_cache_for_generation`, once."""
    mixin: Any = GenerationMixin
    original = mixin._prepare_cache_for_generation
    if hasattr(original, "_tree_attention"):
        return

    @functools.wraps(original)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.config.get_text_config(decoder=True)._attn_implementation == "tree_attention":
            _prepare(self, generation_config, model_kwargs)
        return original(self, generation_config, model_kwargs, *args, **kwargs)

    prepare._tree_attention = True  # type: ignore[attr-defined]
    mixin._prepare_cache_for_generation = prepare


def _prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    if generation_config.max_time is not None:
        raise Unsupported("max_time would stop the ranks at different tokens: use max_new_tokens")
    if generation_config.cache_implementation is not None:
        raise Unsupported(
            f"cache_implementation={generation_config.cache_implementation!r} is not supported with tree_attention: "
            "leave it out, or pass past_key_values=TreeCache(model.config)"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is None and generation_config.use_cache is not False:
        cache = model_kwargs["past_key_values"] = TreeCache(model.config, sequence_axis(model))
    if isinstance(cache, TreeCache):
        check_axes(model, cache.placement.group)
    if isinstance(cache, TreeCache) and cache.placement.max_tokens is not None:
        cache.placement.check_room(generation_config.max_length - 1)  # the last token is not fed
        cache.disable_compile = bool(generation_config.disable_compile)
        install_step(model)
    sequence = cache.placement.group if isinstance(cache, TreeCache) else resolve_group()
    for group in (sequence, tensor_group(model)):
        if generation_config.do_sample and group is not None:
            share_random_state(group, model.device)
    if (
        FEEDS_AGAIN
        and generation_config.prefill_chunk_size is not None
        and cache is not None
        and cache.get_seq_length()
    ):
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
