"""What `generate` needs: one call of all ranks, a TreeCache if the caller passes none, the same random numbers."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import Cache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from ..errors import Unsupported
from .cache import TreeCache
from .calls import Call, current
from .inputs import CACHE, OTHER_NAME, VERSION, check_ids, check_rows
from .models import check_generation, takes_cache
from .step import cache_in, install_step
from .tensor_parallel import check_axes, sequence_axis, tensor_group

# With prefill_chunk_size, older versions feed the whole text to a cache that already holds a part of it.
FEEDS_AGAIN = VERSION < (5, 23)
ALIKE_ON_ALL_RANKS = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)  # they look at the tokens alone


def wrap_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make `GenerationMixin.generate` one call of all ranks, on models with "tree_attention"."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get(OTHER_NAME), Cache):  # both names work on every version of transformers
            kwargs.setdefault(CACHE, kwargs.pop(OTHER_NAME))
        if model.config.get_text_config(decoder=True)._attn_implementation != "tree_attention":
            return original(model, *args, **kwargs)
        given = signature.bind(model, *args, **kwargs)
        named, options = given.arguments, given.arguments.get("kwargs", {})
        if not _involves_ranks(model, named.get("generation_config"), options):
            return original(model, *args, **kwargs)
        with Call("generate", model, cache_in(options)) as call:
            ids = named.get("inputs", options.get("input_ids"))
            call.described["input_ids"] = ids
            if isinstance(ids, Tensor) and not ids.is_floating_point() and "pixel_values" not in options:
                check_ids(model, ids)
            named["stopping_criteria"] = _decided_by_first_rank(named.get("stopping_criteria"))
            result = original(*given.args, **given.kwargs)
            call.result = getattr(result, "sequences", result)
        return result

    generate._tree_attention = True  # type: ignore[attr-defined]
    return generate


def prepare(
    model: Any, generation_config: Any, model_kwargs: Any, generation_mode: str, batch_size: int, *_: Any, **__: Any
) -> None:
    """Act before `GenerationMixin._prepare_cache_for_generation`, on models with "tree_attention"."""
    if model.config.get_text_config(decoder=True)._attn_implementation != "tree_attention":
        return
    cache, is_assisted = model_kwargs.get(CACHE), generation_mode == "assisted_generation"
    call = current.get()
    _check_supported(generation_config, cache, is_assisted)
    needs_cache = cache is None and generation_config.use_cache is not False and takes_cache(model)
    if needs_cache or isinstance(cache, TreeCache):
        held = cache.get_seq_length() if isinstance(cache, TreeCache) else 0
        check_generation(model, held, generation_config, model_kwargs)
    if isinstance(cache, TreeCache):
        _check_cache(model, cache, generation_config, batch_size, is_assisted)
    if call is not None and not call.is_started:
        call.described |= _options(generation_config) | _inputs(model_kwargs)
        call.start()
    if needs_cache:
        cache = model_kwargs[CACHE] = TreeCache(model.config, sequence_axis(model))
        if call is not None:
            call.use(cache.exchange)
    if isinstance(cache, TreeCache):
        layers: list[Any] = cache.layers
        for layer in layers:
            if hasattr(layer, "record_past"):  # transformers never turns it off, and windows would grow without end
                layer.record_past = is_assisted or bool(generation_config.is_assistant)
        if cache.ranks.max_tokens is not None:
            cache.step_state.invalidate_cursor()  # the mask may hide other tokens than the last one did
            cache.disable_compile = bool(generation_config.disable_compile)
            install_step(model)
    if generation_config.do_sample and call is not None:
        for group in call.groups:
            share_random_state(group, model.device)


def _involves_ranks(model: Any, generation_config: Any, options: dict[str, Any]) -> bool:
    """Whether ranks meet in a call of `generate`: in a cache, for random numbers, or within the model."""
    cache = cache_in(options)

    def option(name: str) -> Any:
        given = options.get(name), getattr(generation_config, name, None), getattr(model.generation_config, name)
        return next((value for value in given if value is not None), None)

    samples, use_cache = option("do_sample"), option("use_cache")
    spreads = isinstance(cache, TreeCache) or (cache is None and use_cache is not False)
    return bool(samples or spreads or tensor_group(model))


def _check_supported(generation_config: Any, cache: Any, is_assisted: bool) -> None:
    if generation_config.max_time is not None:
        raise Unsupported("max_time would stop the ranks at different tokens: use max_new_tokens")
    if generation_config.output_attentions:
        raise Unsupported("output_attentions=True is not supported: leave it out, or generate with 'eager' attention")
    if generation_config.cache_implementation is not None:
        raise Unsupported(
            f"cache_implementation={generation_config.cache_implementation!r} is not supported with tree_attention: "
            "leave it out, or pass cache=TreeCache(model.config)"
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


def _check_cache(model: Any, cache: TreeCache, generation_config: Any, batch_size: int, is_assisted: bool) -> None:
    check_axes(model, cache.ranks.given)
    lookup = generation_config.prompt_lookup_num_tokens if is_assisted else None
    # The last token is not fed. The token before it may be fed together with `lookup` guesses.
    cache.check_ready((generation_config.max_length or 0) - 2 + (lookup or 1))
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    check_rows(cache, batch_size * repeats)


def _options(generation_config: Any) -> dict[str, Any]:
    """The options that must be equal on all ranks."""
    options = vars(generation_config).items()
    return {name: value for name, value in options if name[0] != "_" and name != "transformers_version"}


def _inputs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The tensors that must be equal on all ranks."""
    tensors = {name: value for name, value in model_kwargs.items() if isinstance(value, Tensor)}
    mask = tensors.get("attention_mask")
    if mask is not None and bool(mask.all()):
        del tensors["attention_mask"]  # like none
    return tensors


def share_random_state(group: ProcessGroup, device: torch.device) -> None:
    """Give every rank the first rank's generator state, so that equal logits draw equal tokens."""
    on_cuda = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if on_cuda else torch.get_rng_state()
    state = state.to(device)
    dist.broadcast(state, group=group, group_src=0)
    torch.cuda.set_rng_state(state.cpu(), device) if on_cuda else torch.set_rng_state(state)


def _decided_by_first_rank(criteria: Any) -> Any:
    """Let the first rank evaluate criteria that may look at anything, such as a clock, for all ranks."""
    own = [each for each in criteria or [] if not isinstance(each, ALIKE_ON_ALL_RANKS)]
    if not own:
        return criteria
    return StoppingCriteriaList([each for each in criteria if each not in own] + [_SharedCriteria(own)])


class _SharedCriteria(StoppingCriteria):
    def __init__(self, criteria: list[Any]) -> None:
        self.criteria = StoppingCriteriaList(criteria)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        call = current.get()
        groups = [] if call is None else call.groups
        ended = torch.zeros(len(input_ids), dtype=torch.uint8, device=input_ids.device)
        if all(group.rank() == 0 for group in groups):
            ended = self.criteria(input_ids, scores, **kwargs).to(ended)
        for group in groups:
            dist.broadcast(ended, group=group, group_src=0)
        return ended.bool()
