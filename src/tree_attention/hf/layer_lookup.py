"""From an attention call back to the layer of the TreeCache that its keys came out of.

transformers does not pass the cache to the attention function. So `mark` leaves the layer where `layer_of` finds it: on
the key tensor, which other modules may share, and in a context variable for models that rebuild their keys from what
`update` returned (latent attention). torch.compile cannot read a context variable; it uses `stepping_layers`.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .cursor import stepping_layers
from .layers import KeyLayer

_last_update: ContextVar[tuple[int, KeyLayer] | None] = ContextVar("_last_update", default=None)


def mark(key: Tensor, layer_idx: int, layer: KeyLayer) -> None:
    """Note that `key` came out of `layer`, which was updated last in this thread."""
    key._tree_layer = layer  # type: ignore[attr-defined]
    if not torch.compiler.is_compiling():
        _last_update.set((layer_idx, layer))


def layer_of(module: Any, key: Tensor) -> KeyLayer | None:
    """Return the layer that `key` came out of; None if it came out of no TreeCache."""
    if torch.compiler.is_compiling():
        layer = getattr(key, "_tree_layer", None)
        return stepping_layers[-1][module.layer_idx] if layer is None and stepping_layers else layer
    last_update = _last_update.get()
    if last_update is not None and last_update[0] == getattr(module, "layer_idx", None):
        _last_update.set(None)
        return last_update[1]
    return getattr(key, "_tree_layer", None)
