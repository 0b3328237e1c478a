"""`HybridLayer`: attention beside linear attention in one layer. Keys are spread over the ranks, states are not."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from .layers import ShardedLayer
from .window_layer import ReplicatedWindowLayer

# transformers' attributes: dictionaries by the number of the state
STATES = ("conv_states", "recurrent_states")
FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class _States:
    """What a layer's linear attention adds to the methods of its attention, which come next in the order of bases."""

    def reset(self: Any) -> None:
        attention: Any = super()
        attention.reset()
        LinearAttentionLayer.reset(self)

    def batch_select_indices(self: Any, indices: Any) -> None:
        attention: Any = super()
        attention.batch_select_indices(indices)
        LinearAttentionLayer.reorder_cache(self, indices)

    def crop(self: Any, tokens_to_remove: int) -> None:
        attention: Any = super()
        attention.crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)

    def export_state(self: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        attention: Any = super()
        tensors, plain = attention.export_state()
        states = {f"{name}.{i}": state for name in STATES for i, state in getattr(self, name).items()}
        tensors |= {path: state for path, state in states.items() if state is not None}
        return tensors, plain | {f"{name}.{i}": flag for name in FLAGS for i, flag in getattr(self, name).items()}

    def import_state(self: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        keys = {name: tensor for name, tensor in tensors.items() if name in ("keys", "values")}
        attention: Any = super()
        attention.import_state(keys, plain)
        self.import_states(tensors, plain)

    def import_states(self: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The part of `import_state` that is not keys and values."""
        for names, source in ((STATES, tensors), (FLAGS, plain)):
            for name in names:
                for i in getattr(self, name):
                    value = source.get(f"{name}.{i}")
                    getattr(self, name)[i] = value.clone() if isinstance(value, Tensor) else value

    def undo_point(self: Any) -> Callable[[], None]:
        attention: Any = super()
        undo_keys, (tensors, plain) = attention.undo_point(), self.export_state()
        copies = {path: tensor.clone() for path, tensor in tensors.items() if path not in ("keys", "values")}

        def undo() -> None:
            undo_keys()
            self.import_states(copies, plain)

        return undo


class HybridLayer(_States, ShardedLayer, LinearAttentionAndFullAttentionLayer):
    """Full attention beside linear attention."""

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:
        """Called with keys and values by the attention part, with named arguments by the other."""
        part: Any = ShardedLayer if keys_and_values else LinearAttentionLayer
        part.lazy_initialization(self, *keys_and_values, **states)


class HybridWindowLayer(_States, ReplicatedWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Windowed attention beside linear attention: whole on every rank."""
