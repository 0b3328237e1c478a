"""`TreeCache`: a transformers cache whose full-attention layers hold only this rank's tokens.

Lengths, as transformers asks for them, count all ranks' tokens; keys and values are this rank's. Layers with a window
are small and stay whole on every rank (then they need no communication), linear-attention layers likewise.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from ..group import Group, check_agreement
from ..reduce import TwoLevel
from .cursor import Cursor
from .layers import ReplicatedWindowLayer, ShardedLayer
from .placement import Placement
from .tensor import tensor_ranks

BLOCK_TOKENS = 16
WITH_KEYS = (ShardedLayer, ReplicatedWindowLayer)

# The layer that was updated last in this thread, for models that rebuild their keys from what `update` returns (MLA).
_updated: ContextVar[tuple[int, "ShardedLayer | ReplicatedWindowLayer"] | None] = ContextVar("_updated", default=None)
_steps_of: list["TreeCache"] = []  # the same for torch.compile, which sees no ContextVar: whose step is being run


class TreeCache(Cache):
    """The cache to pass as `past_key_values`, for one batch of sequences; many turns may use it.

    Args:
        config: the model's; decides which layers are sharded (full attention), and which stay whole on every rank.
        group: the ranks that share the sequence: a process group, a 1-D DeviceMesh, None for all, or a TwoLevel over
            several hosts. Of a model split over ranks (tensor.py), those with the same heads: `mesh["sequence"]`.
        block_tokens: neighbouring tokens that one rank keeps together.
        max_tokens: makes it static: room for that many tokens over all ranks, allocated once. `generate` then runs one
            CUDA graph a token (step.py). Without it buffers grow, and every step is launched kernel by kernel. A loop
            of your own over single tokens must pass the same `attention_mask` each time, longer by ones: for another
            one it looks only at the start of `generate`, and after several tokens at once.
        step: how the steps of a static cache are run on GPUs: "captured"; "compiled", by torch.compile first, which
            takes about a minute once; or "eager".

    All ranks of the group must make it together: they compare configuration and choices once, here.

    Raises:
        InputError: `block_tokens` or `max_tokens` below 1, another step, a group this rank is not in, no group for a
            model that is split over ranks; later, a token more than `max_tokens`.
        RanksDisagree: on every rank, if config, block_tokens, max_tokens or step differ between ranks.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        group: Group | TwoLevel = None,
        *,
        block_tokens: int = BLOCK_TOKENS,
        max_tokens: int | None = None,
        step: str = "captured",
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
        if group is None and tensor_ranks(config) > 1:
            raise InputError(
                f"the model is split over {tensor_ranks(config)} ranks: say which ranks hold the same heads, "
                "TreeCache(model.config, mesh['sequence'])"
            )
        if step not in ("captured", "compiled", "eager"):
            raise InputError(f"step must be captured, compiled or eager, got {step!r}")
        text_config = config.get_text_config(decoder=True)
        self.config = text_config
        self.placement = Placement(group, block_tokens, max_tokens)
        self.steps: dict[Any, Any] = {}  # of step.py
        self.step, self.disable_compile = step, False  # the latter as the last `generate` said
        digest = hashlib.sha256(text_config.to_json_string().encode()).hexdigest()
        described = {"model config": digest[:12], "block_tokens": block_tokens, "max_tokens": max_tokens, "step": step}
        check_agreement(described, self.placement.group)
        super().__init__(layers=[self._place(layer) for layer in DynamicCache(config=text_config).layers])
        self.first = next((i for i, layer in enumerate(self.layers) if isinstance(layer, WITH_KEYS)), None)
        self.in_step = False  # a step has begun, and not ended

    def _place(self, layer: Any) -> Any:
        """Our layer for the kinds that hold keys; every other kind (linear, conv, shared) as transformers made it."""
        if type(layer) is DynamicLayer:
            return ShardedLayer(self.placement)
        if type(layer) is DynamicSlidingWindowLayer:
            return ReplicatedWindowLayer(self.placement, layer.sliding_window)
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != "tree_attention":
            raise InputError(
                "TreeCache needs a model with attn_implementation='tree_attention', which sees the other ranks' keys; "
                f"got {self.config._attn_implementation!r}"
            )
        if layer_idx == self.first and not self.placement.is_stepping:
            self.check_whole()
        keys: Any
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, WITH_KEYS):
            keys._tree_layer = layer
            if not torch.compiler.is_compiling():
                _updated.set((layer_idx, layer))
        return keys, values

    def check_whole(self) -> None:
        """Raise InputError if a forward pass ended in the middle, and left layers that do not hold the same tokens."""
        lengths = {layer.length for layer in self.layers if isinstance(layer, WITH_KEYS)}
        # A step writes its keys once more; what it has done to a state stays.
        has_state = any(type(layer).__name__ == "LinearAttentionLayer" for layer in self.layers)
        if len(lengths) > 1 or (self.in_step and has_state):
            raise InputError(
                "a forward pass broke off, and layers of this TreeCache hold different tokens: make a new one on every "
                "rank, and pass the whole text again"
            )

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(int(tokens_to_remove))  # transformers 5.17 passes a tensor, and lengths are the host's

    def reset(self) -> None:
        super().reset()
        self.in_step = False

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens over all ranks when a layer next grows, so that it grows once."""
        self.placement.reserved = tokens

    @contextlib.contextmanager
    def parallel_chunk(self, start: int, stop: int) -> Iterator[Tensor]:
        """Within it each rank feeds only its own slots of `start .. stop - 1`, which are given: int64, ascending."""
        self.placement.chunk = (start, stop)
        try:
            yield self.placement.layout.slots(start, stop, self.placement.rank)
        finally:
            self.placement.chunk = None

    def can_step(self) -> bool:
        """Whether the next token can be fed without the host: a static cache that was read into, of layers that can."""
        return (
            self.placement.max_tokens is not None
            and self.get_seq_length() > 0
            and all(
                layer.is_initialized and not getattr(layer, "record_past", False)
                if isinstance(layer, WITH_KEYS)
                else type(layer).__name__ in ("DummyLayer", "LinearAttentionLayer")
                for layer in self.layers
            )
        )

    def begin_step(self, batch: int, device: torch.device, attention_mask: Tensor | None) -> Cursor:
        """The cursor, where the host says that the cache ends.

        attention_mask: as `generate` passes it; looked at where the cache has changed since the last step, or a
        `generate` begun, since a look at each step would wait for the device.
        """
        placement, length = self.placement, self.get_seq_length()
        placement.check_room(length + 1)
        if placement.cursor is None or len(placement.cursor.held) != batch:
            placement.cursor = Cursor(placement.layout, placement.rank, placement.capacity, batch, device)
            placement.moved = True
        if placement.moved or self.in_step:  # a step that broke off may have moved the cursor on
            self.check_whole()
            if attention_mask is not None:
                attention_mask = None if bool(attention_mask.all()) else attention_mask.bool()
            placement.cursor.start(length, attention_mask, placement.most_tokens)
            for layer in self.layers:
                if isinstance(layer, ShardedLayer):
                    layer.grow(1)
                elif isinstance(layer, ReplicatedWindowLayer):
                    layer.to_ring()
            placement.moved = False
        self.in_step = True
        return placement.cursor

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it layers and attention go by the cursor, which moves on by one token."""
        self.placement.is_stepping = True
        _steps_of.append(self)
        try:
            self.placement.stepping_cursor.advance()
            yield
        finally:
            _steps_of.remove(self)
            self.placement.is_stepping = False

    def end_step(self) -> None:
        """Let the host count the token that the device has counted."""
        for layer in self.layers:
            if isinstance(layer, WITH_KEYS):
                layer.count(1)
        self.in_step = False

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that this rank has allocated."""
        buffers = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(buffer.nbytes for buffer in buffers if isinstance(buffer, Tensor))

    @property
    def received_bytes(self) -> float:
        """Bytes that this rank received for attention so far."""
        return self.placement.received_bytes


def layer_behind(module: Any, key: Tensor) -> ShardedLayer | ReplicatedWindowLayer | None:
    """The layer that `key` came out of: marked on the tensor, or the one that this module updated last."""
    if torch.compiler.is_compiling():
        layer = getattr(key, "_tree_layer", None)
        return _steps_of[-1].layers[module.layer_idx] if layer is None and _steps_of else layer
    index_and_layer = _updated.get()
    if index_and_layer is not None and index_and_layer[0] == getattr(module, "layer_idx", None):
        _updated.set(None)
        return index_and_layer[1]
    return getattr(key, "_tree_layer", None)
