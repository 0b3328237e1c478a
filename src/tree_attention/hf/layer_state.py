"""Export and import what the layers of a TreeCache hold: for saves, for copies, and to undo a failed call."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def copy_cache(source: Any) -> Any:
    """Return a new TreeCache with the same tokens. All ranks call it together."""
    sizes: dict[str, Any] = {"block_tokens": source.ranks.layout.block, "max_tokens": source.ranks.max_tokens}
    target = type(source)(source.config, source.given_group, step=source.step_mode, **sizes)
    for old, new in zip(source.layers, target.layers, strict=True):
        import_state(new, *export_state(old))
    target.is_unfinished = source.is_unfinished
    return target


@contextlib.contextmanager
def restore_on_error(cache: Any) -> Iterator[None]:
    """If the block raises, give the cache back what it held before."""
    undo_points = [_undo_point(layer) for layer in cache.layers]
    was_unfinished = cache.is_unfinished
    try:
        yield
    except BaseException:
        for undo in undo_points:
            undo()
        cache.is_unfinished = was_unfinished
        cache.step_state.invalidate_cursor()
        cache.step_state.buffers_changed()  # a captured step reads the memory of states
        raise


def export_state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return views of a layer's tensors, and its numbers and flags."""
    if hasattr(layer, "export_state"):
        return layer.export_state()
    tensors, plain = {}, {}
    for name, value in vars(layer).items():
        items = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        for path, item in items.items():
            if isinstance(item, Tensor):
                tensors[path] = item
            elif item is None or isinstance(item, bool | int | float | str):
                plain[path] = item
    return tensors, plain


def import_state(layer: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Copy an exported state into a layer that is new, or that it was exported from."""
    if hasattr(layer, "import_state"):
        layer.import_state(tensors, plain)
        return
    for path, value in (plain | _copies(tensors)).items():
        name, _, key = path.partition(".")
        if key:
            getattr(layer, name)[int(key)] = value
        else:
            setattr(layer, name, value)
    for tensor in tensors.values():
        layer.dtype, layer.device = tensor.dtype, tensor.device


def _undo_point(layer: Any) -> Callable[[], None]:
    """Return a function that restores what the layer holds now."""
    if hasattr(layer, "undo_point"):
        return layer.undo_point()
    tensors, plain = export_state(layer)
    copies = _copies(tensors)  # a state is updated in place
    return lambda: import_state(layer, copies, plain)


@torch.inference_mode(False)  # a state is written to later, in inference mode or not
def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
