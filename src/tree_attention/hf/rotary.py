"""Rotary frequencies that follow the text's length ("dynamic", "longrope"), and models that drop their cache for it."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import Unsupported


@contextlib.contextmanager
def frequencies_of(body: Any, positions: torch.Tensor) -> Iterator[None]:
    """Inside, all forward passes use the frequencies of a text with these positions, as if it were read in one pass."""
    frozen, last = [], None
    for module in body.modules():
        types = getattr(module, "rope_type", None)
        by_layer_type = types if isinstance(types, dict) else {None: types}
        following = [layer_type for layer_type, kind in by_layer_type.items() if _follows_length(kind)]
        if not following:
            continue
        last = positions.max().reshape(1, 1) if last is None else last
        for layer_type in following:  # transformers sets the frequencies when the module is called
            module(torch.empty(0, device=last.device), last, *[] if layer_type is None else [layer_type])
        frozen.append((module, types))
    try:
        for module, types in frozen:
            module.rope_type = dict.fromkeys(types, "default") if isinstance(types, dict) else "default"
        yield
    finally:
        for module, types in frozen:
            module.rope_type = types


def check_switch(model: Any, held: int, read: int, length: int) -> None:
    """Raise Unsupported if `generate` would drop a filled cache, to read its text again with other frequencies.

    Phi-3's code does once a text is longer than `original_max_position_embeddings`.

    Args:
        held, read: tokens in the cache, and in the whole text with them.
        length: tokens of the text with the answer.
    """
    switch = switch_length(model)
    if switch is not None and (0 < held <= switch < read or read <= switch < length - 1):
        raise Unsupported(
            f"beyond {switch} tokens this model drops its cache and reads the whole text again, with other rotary "
            f"frequencies; the cache holds {held}, {read} are to be read, {length} with the answer: stay within "
            f"{switch}, or read more than {switch} tokens at once into a new cache"
        )


def switch_length(model: Any) -> int | None:
    """The length beyond which the model's own code drops a cache that is not longer; None for most models."""
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    code = getattr(inspect.unwrap(prepare), "__code__", None) if prepare else None
    if code is None or "original_max_position_embeddings" not in code.co_names + code.co_consts:
        return None
    return getattr(model.config, "original_max_position_embeddings", None)


def _follows_length(kind: Any) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
