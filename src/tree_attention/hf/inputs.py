"""What a caller passes: checks before anything is computed, and texts by which ranks compare it."""

import hashlib
import json
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import InputError
from .cache import TreeCache

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# The argument that takes a cache: transformers 5.24 renamed it, and warns of the old name.
CACHE, OTHER_NAME = ("cache", "past_key_values") if VERSION >= (5, 24) else ("past_key_values", "cache")
SAMPLED = 1 << 16  # numbers of a float tensor that its digest reads


def check_ids(model: Any, ids: Tensor) -> None:
    """Raise InputError if a token is outside the table of embeddings."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows and ids.numel():
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= rows:
            raise InputError(
                f"input_ids must be 0 to {rows - 1}, rows of the model's embeddings, got {low if low < 0 else high}: "
                "use this model's tokenizer"
            )


def check_rows(cache: TreeCache, rows: int) -> None:
    """Raise InputError unless the cache is empty, or holds this number of rows."""
    held = next((len(layer.keys) for layer in cache.key_layers if layer.is_initialized), rows)
    if cache.get_seq_length() and held != rows:
        raise InputError(
            f"this TreeCache holds {held} rows, and {rows} are needed (batch size x num_beams or "
            f"num_return_sequences): repeat its rows by cache.batch_repeat_interleave(n), or pass {held}"
        )


def as_text(value: Any) -> str:
    """Return a text that is equal for equal values, and is short for tensors."""
    if not isinstance(value, Tensor):
        return json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
    shape, flat = list(value.shape), value.detach().flatten()
    if flat.is_floating_point():
        flat = flat[:: max(len(flat) // SAMPLED, 1)].double()
    return f"{shape} with digest {hashlib.sha256(flat.cpu().contiguous().numpy().tobytes()).hexdigest()[:8]}"


def autocast_of(model: Any) -> str | None:
    """Return the dtype that `torch.autocast` computes in on the model's device; None outside of it."""
    device = getattr(getattr(model, "device", None), "type", "cpu")
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def adapters_of(model: Any) -> tuple[list[str], str]:
    """Return the names of the active adapters (LoRA and others of PEFT), and a digest of how each layer uses them."""
    names, layers = set(), []
    for name, module in model.named_modules():
        active, scaling = getattr(module, "active_adapters", None), getattr(module, "scaling", None)
        scaling = scaling if isinstance(scaling, dict) else {}
        if not isinstance(active, list | tuple):  # of a model of transformers', it is a method
            active = list(scaling)
        if getattr(module, "disable_adapters", None) is True:
            active = []
        if active or scaling:
            merged = getattr(module, "merged_adapters", None)
            layers.append((name, {each: scaling.get(each) for each in active}, merged))
            names |= set(active)
    digest = hashlib.sha256(json.dumps(layers, default=str).encode()).hexdigest()[:16]
    return sorted(names), digest if layers else ""
