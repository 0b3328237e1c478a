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
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError, Unavailable
from ..group import Group, check_agreement, rank_and_size, resolve_group
from ..layout import Layout
from ..partial import Partial
from ..reduce import SharedMemoryLink, choose_algorithm, received_bytes, tree_reduce
from .chunk import gather_in_slot_order

BLOCK_TOKENS = 16

# The layer that was updated last in this thread, for models that rebuild their keys from what `update` returns (MLA).
_updated: ContextVar[tuple[int, "ShardedLayer | ReplicatedWindowLayer"] | None] = ContextVar("_updated", default=None)


class TreeCache(Cache):
    """The cache to pass as `past_key_values`, for one batch of sequences; many turns may use it.

    Args:
        config: the model's; decides which layers are sharded (full attention), and which stay whole on every rank.
        group: the ranks that share the sequence: a process group, a 1-D DeviceMesh, or None for all.
        block_tokens: neighbouring tokens that one rank keeps together.

    All ranks of the group must make it together: they compare configuration and choices once, here.

    Raises:
        InputError: `block_tokens` below 1, a group this rank is not in.
        RanksDisagree: on every rank, if config or block_tokens differ between ranks.
    """

    def __init__(self, config: PreTrainedConfig, group: Group = None, *, block_tokens: int = BLOCK_TOKENS) -> None:
        text_config = config.get_text_config(decoder=True)
        self.config = text_config
        self.placement = Placement(resolve_group(group), block_tokens)
        digest = hashlib.sha256(text_config.to_json_string().encode()).hexdigest()
        described = {"model config": digest[:12], "block_tokens": block_tokens}
        check_agreement(described, self.placement.group)
        super().__init__(layers=[self._place(layer) for layer in DynamicCache(config=text_config).layers])

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
        keys: Any
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, ShardedLayer | ReplicatedWindowLayer):
            keys._tree_layer = layer
            _updated.set((layer_idx, layer))
        return keys, values

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

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that this rank has allocated."""
        buffers = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(buffer.nbytes for buffer in buffers if isinstance(buffer, Tensor))

    @property
    def received_bytes(self) -> float:
        """Bytes that this rank received for attention so far."""
        return self.placement.received_bytes


class Placement:
    """What all layers of one cache share: the ranks, the layout, and the chunk that is being read, if any."""

    def __init__(self, group: ProcessGroup | None, block_tokens: int) -> None:
        self.group = group
        self.rank, size = rank_and_size(group)
        self.layout = Layout(size, block_tokens)
        self.link = _shared_memory(group)
        self.chunk: tuple[int, int] | None = None  # set while each rank feeds only its own part of these slots
        self.reserved = 0
        self.received_bytes = 0.0

    def reduce(self, partial: Partial) -> Partial:
        """The merge over all ranks, and a note of its bytes."""
        size, rows, head_dim = self.layout.world_size, partial.lse.numel(), partial.out.shape[3]
        linked = self.link is not None and self.link.fits(partial)
        algorithm = choose_algorithm(partial.out.device.type, size, linked=linked)
        self.received_bytes += received_bytes(algorithm, rows=rows, head_dim=head_dim, world_size=size)
        return tree_reduce(partial, self.link if linked else self.group, algorithm=algorithm)


def _shared_memory(group: ProcessGroup | None) -> SharedMemoryLink | None:
    """A link for CPU tensors if the ranks can have one: a gloo group on one host."""
    if group is None or group.size() == 1 or "gloo" not in str(dist.get_backend_config(group)):
        return None
    try:
        return SharedMemoryLink(group)
    except Unavailable:  # several hosts; on every rank alike
        return None


class ShardedLayer(CacheLayerMixin):
    """Full attention: holds slots `layout.slots(0, length, rank)`, in buffers `[B, H_kv, capacity, D]` that grow."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    keys: Any  # Tensor, or None before the first update
    values: Any

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.length = 0  # slots over all ranks
        self.fed = 0  # slots over all ranks that the last update brought

    @property
    def held(self) -> int:
        """Slots on this rank."""
        return self.placement.layout.local_length(self.length, self.placement.rank)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (_resized(t[:, :, :0], 1) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what this rank owns of the new tokens; returns all it holds, or one unused key if that is nothing.

        (Models that reshape what they get, such as DeepSeek's, cannot take a tensor without elements; the attention
        function cuts it to `held`.)
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        placement, before, old = self.placement, self.length, self.held
        chunk = placement.chunk
        self.fed = key_states.shape[2] if chunk is None else chunk[1] - chunk[0]
        self.length = before + self.fed
        new = self.held - old
        if new:
            self._grow(self.held)
            if new < key_states.shape[2]:
                mine = placement.layout.slots(before, self.length, placement.rank, device=key_states.device) - before
                key_states, value_states = key_states[:, :, mine], value_states[:, :, mine]
            self.keys[:, :, old : self.held] = key_states
            self.values[:, :, old : self.held] = value_states
        shown = max(self.held, 1)
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def _grow(self, needed: int) -> None:
        """Room for `needed` slots: what was reserved, or a 64th (at least 64) more than needed."""
        if needed > self.keys.shape[2]:
            reserved = self.placement.layout.local_length(self.placement.reserved, self.placement.rank)
            capacity = reserved if reserved >= needed else needed + max(64, needed // 64)
            self.keys, self.values = _resized(self.keys, capacity), _resized(self.values, capacity)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        chunk = self.placement.chunk
        return (self.length + query_length if chunk is None else chunk[1]), 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.length, self.fed = False, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self.length = max(self.length + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.batch_select_indices(beam_idx.to(self.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (t.repeat_interleave(repeats, 0) for t in (self.keys, self.values))


class ReplicatedWindowLayer(DynamicSlidingWindowLayer):
    """Sliding-window or chunked attention: the window is whole on every rank."""

    def __init__(self, placement: Placement, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.placement = placement
        self.length = 0  # as in ShardedLayer
        self.fed = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As its base, after gathering what the other ranks were fed; returns the window and the new tokens."""
        if self.placement.chunk is not None and self.placement.group is not None:
            mine = torch.cat([key_states, value_states], -1)
            gathered = gather_in_slot_order(mine, self.placement.group, self.placement.layout.block)
            key_states, value_states = gathered.split([key_states.shape[3], value_states.shape[3]], -1)
            self.placement.received_bytes += gathered.nbytes - mine.nbytes
        self.fed = key_states.shape[2]
        result = super().update(key_states, value_states, *args, **kwargs)
        self.length = self.cumulative_length
        return result

    def reset(self) -> None:
        """Drop the window (transformers 5.17 would keep it, zeroed)."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length, self.length, self.fed = False, 0, 0, 0


def layer_behind(module: Any, key: Tensor) -> ShardedLayer | ReplicatedWindowLayer | None:
    """The layer that `key` came out of: marked on the tensor, or the one that this module updated last."""
    index_and_layer = _updated.get()
    if index_and_layer is not None and index_and_layer[0] == getattr(module, "layer_idx", None):
        _updated.set(None)
        return index_and_layer[1]
    return getattr(key, "_tree_layer", None)


def _resized(buffer: Tensor, capacity: int) -> Tensor:
    """A larger buffer with the same beginning."""
    resized = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[3]))
    resized[:, :, : buffer.shape[2]] = buffer
    return resized
