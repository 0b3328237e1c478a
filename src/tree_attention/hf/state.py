"""What a layer of a TreeCache holds, taken out and put back: for saves, for forks, and to undo what failed."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .cache import TreeCache
from .layers import ReplicatedWindowLayer, ShardedLayer


def copy_cache(source: TreeCache, target: TreeCache) -> None:
    """Into a new cache of the same model, ranks and block size; no communication."""
    for old, new in zip(source.layers, target.layers, strict=True):
        tensors, plain = state_of(old)
        if not isinstance(new, ShardedLayer):
            set_state(new, {name: tensor.clone() for name, tensor in tensors.items()}, plain)
        elif tensors and isinstance(old, ShardedLayer):
            new.lazy_initialization(*(tensors[name][:, :, :0] for name in ("keys", "values")))
            new.length = old.length
            new.grow(new.held)
            for name, buffer in (("keys", new.keys), ("values", new.values)):
                buffer[:, :, : new.held] = tensors[name]
    target.placement.moved = True


@contextlib.contextmanager
def undone_on_error(cache: TreeCache) -> Iterator[None]:
    """If what is within raises, the cache holds afterwards what it held before."""
    kept: list[Any] = []
    in_step = cache.in_step
    for layer in cache.layers:
        if isinstance(layer, ShardedLayer):
            kept.append(layer.length)
            continue
        tensors, plain = state_of(layer)
        if not isinstance(layer, ReplicatedWindowLayer):  # a state is written in place, a window is replaced
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        kept.append((tensors, plain))
    try:
        yield
    except BaseException:
        for layer, before in zip(cache.layers, kept, strict=True):
            if isinstance(layer, ShardedLayer):
                layer.length = before
                continue
            if isinstance(layer, ReplicatedWindowLayer):
                layer.reset()
            set_state(layer, *before)
        cache.in_step, cache.placement.moved = in_step, True
        cache.placement.version += 1  # a captured step reads the states' memory
        raise


def state_of(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A layer's tensors, and its numbers and flags."""
    if isinstance(layer, ShardedLayer):
        held = layer.held
        if not layer.is_initialized:
            return {}, {}
        return {"keys": layer.keys[:, :, :held], "values": layer.values[:, :, :held]}, {}
    if isinstance(layer, ReplicatedWindowLayer):
        layer.from_ring()
        whole = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
        return {name: tensor for name, tensor in whole.items() if tensor is not None}, {"length": layer.length}
    tensors, plain = {}, {}
    for name, value in vars(layer).items():
        for key, item in value.items() if isinstance(value, dict) else [(None, value)]:
            path = name if key is None else f"{name}.{key}"
            if isinstance(item, Tensor):
                tensors[path] = item
            elif item is None or isinstance(item, bool | int | float | str):
                plain[path] = item
    return tensors, plain


def set_state(layer: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """The inverse, on a new layer."""
    if isinstance(layer, ReplicatedWindowLayer):
        if tensors:
            layer.lazy_initialization(tensors["keys"], tensors["values"])
            layer.keys, layer.values = tensors["keys"], tensors["values"]
        layer.count(plain["length"])
        return
    for path, value in (plain | tensors).items():
        name, _, key = path.partition(".")
        if key:
            getattr(layer, name)[int(key)] = value
        else:
            setattr(layer, name, value)
    for tensor in tensors.values():
        layer.dtype, layer.device = tensor.dtype, tensor.device
