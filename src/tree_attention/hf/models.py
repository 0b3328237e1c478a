"""Which models a TreeCache is right for, told before anything is computed from a configuration or a model."""

import functools
import inspect
import logging
import re
import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import Unsupported
from .model_types import KNOWN
from .rotary import check_switch

INSTEAD = "use model.generate(..., prefill_chunk_size=n), which reads the prompt on every rank alike"
PLACEHOLDER = re.compile(r"(image|img|video|audio|speech)\w*_token(_id|_index)?")  # a configuration's field
REFUSED = {
    **dict.fromkeys(["doge", "mvp"], "looks at its attention mask"),
    "recurrent_gemma": "keeps its state in its layers, not in the cache",
    "git": "computes attention itself",
    **dict.fromkeys(["inkling_text", "inkling2_text"], "adds a bias to its scores"),
}
OTHERWISE = "load this model with another attn_implementation, and use transformers' own cache"


def check_config(config: PreTrainedConfig) -> None:
    """Raise Unsupported if the model's code computes attention itself, and so would see one rank's keys only."""
    if config.model_type in REFUSED:
        raise Unsupported(f"{config.model_type} {REFUSED[config.model_type]}, which is not supported: {OTHERWISE}")
    _check_module(type(config).__module__.replace("configuration_", "modeling_"), config.model_type)


@functools.cache
def warn_of(model_type: str) -> None:
    """Log a warning, once, if nobody has compared this type of model with stock attention."""
    if model_type not in KNOWN:
        logging.getLogger(__name__).warning(
            "tree_attention has not been compared with stock attention for models of type %s: "
            "tree_attention.hf.check_model(model) compares them here, in seconds",
            model_type,
        )


def check_loading(model: Any, attn_implementation: Any, *_: Any, **__: Any) -> None:
    """Act before transformers accepts an attention implementation: refuse a model with attention of its own."""
    if attn_implementation == "tree_attention" and model.can_generate():
        check_config(model.config.get_text_config(decoder=True))


def check_supported(model: Any) -> None:
    """Raise Unsupported if `model` cannot use a TreeCache: attention or a cache of its own, or an encoder."""
    check_config(model.config.get_text_config(decoder=True))
    if type(model).__module__.startswith("transformers_modules."):  # code that came with the weights
        _check_module(type(model).__module__, model.config.model_type)
    if model.config.is_encoder_decoder:
        raise Unsupported(f"{model.config.model_type} is an encoder-decoder model, which is not supported: {OTHERWISE}")
    if not takes_cache(model):
        raise Unsupported(
            f"{model.config.model_type} has a cache of its own: call generate without cache; every rank then "
            "keeps all of it"
        )


def check_generation(model: Any, held: int, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise Unsupported if `generate` with this TreeCache would not use it, or give another answer than stock."""
    check_supported(model)
    mask: Any = model_kwargs.get("attention_mask")
    length = generation_config.max_length or 0
    is_2d = isinstance(mask, Tensor) and mask.ndim == 2
    read = mask.shape[1] if is_2d else length - (generation_config.max_new_tokens or 0)
    check_switch(model, held, read, length)


def takes_cache(model: Any) -> bool:
    """Whether `generate` would make a DynamicCache for the model; others make their own in `forward`."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is None or supports()


def takes_positions(model: Any) -> bool:
    """Whether the model is told the positions of its tokens; others count them from the cache's length."""
    return "position_ids" in inspect.signature(model.base_model.forward).parameters


def check_prefill(model: Any, input_ids: Tensor) -> None:
    """Raise Unsupported if a rank cannot feed just its own tokens of `input_ids`."""
    if not takes_positions(model):
        name = type(model.base_model).__name__
        raise Unsupported(f"context-parallel prefill needs position_ids, which {name} does not take: {INSTEAD}")
    for name, token in vars(model.config).items():
        if PLACEHOLDER.fullmatch(name) and isinstance(token, int) and bool((input_ids == token).any()):
            raise Unsupported(f"context-parallel prefill reads text only, got {name} {token} in input_ids: {INSTEAD}")


def _check_module(name: str, model_type: str) -> None:
    modeling = sys.modules.get(name)
    if modeling is not None and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise Unsupported(f"{model_type} computes attention itself, which is not supported: {OTHERWISE}")
