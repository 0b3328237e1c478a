"""`TreeCache`: a transformers cache whose full-attention layers hold this rank's keys only. Lengths count all."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ..errors import InputError, Unsupported
from ..group import Group, check_agreement, rank_and_size, resolve_group
from ..layout import Layout
from ..reduce import TwoLevel
from .cursor import MAX_STEP_TOKENS, Cursor, StepState
from .exchange import CacheExchange, CacheRanks, channel_of
from .hybrid_layer import HybridLayer, HybridWindowLayer
from .layer_state import copy_cache
from .layers import KeyLayer, ShardedLayer, keep_writable, mark
from .models import OTHERWISE, check_config, warn_of
from .refusing import LengthInChunk
from .tensor_parallel import tensor_ranks
from .window_layer import ReplicatedWindowLayer

BLOCK_TOKENS = 16
STEP_MODES = ("captured", "compiled", "eager")
UNUSED_LAYER = getattr(cache_utils, "DummyLayer", None)  # not in transformers 5.17
INTERRUPTED = (
    "a forward pass was interrupted, so layers of this TreeCache hold different tokens: create a new one on every "
    "rank, and pass the whole text again"
)


class TreeCache(Cache):
    """The cache to pass as `model.generate(..., cache=cache)`: for one batch of sequences, over any number of turns.

    All ranks of the group create it together; they compare the configuration and the arguments once, here.

    Args:
        config: the model's configuration. It decides which layers are sharded (full attention) and which stay whole on
            every rank.
        group: the ranks that share the sequence: a process group, a 1-D DeviceMesh, None for all ranks, or a TwoLevel
            over several hosts. For a model that is split over ranks, the ranks with the same heads:
            `mesh["sequence"]`.
        block_tokens: number of neighboring tokens that one rank keeps together.
        max_tokens: makes the cache static: buffers for that many tokens over all ranks, allocated once. `generate` then
            runs one CUDA graph per token. Default: buffers grow, and each step is launched kernel by kernel. A loop of
            your own over steps of 1 to 16 tokens must pass the same `attention_mask` each time, extended by ones: a
            different mask is only noticed at the start of `generate`, and after an update by more tokens at once.
        step: how a static cache's decode steps run on GPUs: "captured"; "compiled", which calls torch.compile first and
            takes about a minute once; or "eager".

    Raises:
        InputError: `block_tokens` or `max_tokens` is below 1, `step` is unknown, this rank is not in the group, or a
            split model has no group. Later: more than `max_tokens` tokens.
        Unsupported: the model computes attention itself, or has layers of a kind that is not known to be exact.
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
        if step not in STEP_MODES:
            raise InputError(f"step must be captured, compiled or eager, got {step!r}")
        check_config(config.get_text_config(decoder=True))
        process_group = group.group if isinstance(group, TwoLevel) else resolve_group(group)
        rank, size = rank_and_size(process_group)
        if rank == 0:
            warn_of(config.get_text_config(decoder=True).model_type)
        self.ranks = CacheRanks(process_group, rank, Layout(size, block_tokens), max_tokens, channel_of(process_group))
        self.exchange = CacheExchange(group, self.ranks, config)
        self.step_state = StepState(self.ranks)
        self.is_unfinished = False  # True if a step began and did not end, because an error interrupted it
        self.step_mode, self.disable_compile = step, False  # the latter: as the last `generate` was told
        self.captured_steps: dict[Any, Any] = {}  # written by step.py
        self.config, self.given_group = config.get_text_config(decoder=True), group
        digest = hashlib.sha256(self.config.to_json_string().encode()).hexdigest()
        described = {"model config": digest[:12], "block_tokens": block_tokens, "max_tokens": max_tokens, "step": step}
        check_agreement(described, process_group)
        super().__init__(layers=[self._our_layer(layer) for layer in DynamicCache(config=self.config).layers])
        self.key_layers: list[Any] = [layer for layer in self.layers if isinstance(layer, KeyLayer)]
        self.state_layers = [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        self.pass_start = 0  # slots before the forward pass that is running, or ran last
        self.first_fed: int | None = None  # the layer that each pass feeds first
        # Chunks begin at a row's first real token, so the rule of a padded row is only known from the padding.
        self.rule_needs_padding = getattr(self.config, "attention_chunk_size", None) is not None

    def _our_layer(self, layer: Any) -> Any:
        """Our layer for the kinds that hold keys; linear attention and unused layers stay as transformers made them."""
        shared = self.ranks, self.exchange, self.step_state
        if type(layer) is DynamicLayer:
            return ShardedLayer(*shared)
        if type(layer) is DynamicSlidingWindowLayer:
            return ReplicatedWindowLayer(*shared, sliding_window=layer.sliding_window)
        if type(layer) is LinearAttentionAndFullAttentionLayer:
            return HybridLayer(*shared, number_of_states=layer.number_of_states)
        if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            return HybridWindowLayer(
                *shared, sliding_window=layer.sliding_window, number_of_states=layer.number_of_states
            )
        if type(layer) in (LinearAttentionLayer, UNUSED_LAYER):
            return keep_writable(layer)
        raise Unsupported(
            f"{self.config.model_type} has layers of the kind {type(layer).__name__}, which is not supported: "
            + OTHERWISE
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "TreeCache":
        """Return a cache with the same tokens, and links of its own. All ranks call it together."""
        return memo.setdefault(id(self), copy_cache(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Unsupported(
            "a TreeCache holds links to other ranks and cannot be pickled: save a Session with session.save(folder), "
            "or copy the cache by copy.deepcopy, on all ranks together"
        )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != "tree_attention":
            raise InputError(
                "TreeCache needs a model with attn_implementation='tree_attention', which sees the other ranks' keys; "
                f"got {self.config._attn_implementation!r}"
            )
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, KeyLayer) and not self.step_state.is_stepping:
            self._begin_update(layer, layer_idx, layer.tokens_in(key_states))
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer, KeyLayer):
            mark(keys, layer_idx, layer)
        return keys, values

    def _begin_update(self, layer: KeyLayer, layer_idx: int, tokens: int) -> None:
        """Check that the layer holds what the others held when this forward pass began."""
        if self.first_fed is None or layer_idx == self.first_fed:
            self.first_fed = layer_idx
            self.check_ready(layer.length + tokens)
            self.pass_start = layer.length
        elif layer.length != self.pass_start:
            raise InputError(INTERRUPTED)

    def check_ready(self, length: int) -> None:
        """Raise InputError if a static cache is too small for `length` tokens, or layers hold different tokens."""
        self.exchange.check_usable()
        lengths = {layer.length for layer in self.fed_layers}
        # A repeated step overwrites its keys, but a linear-attention state has already advanced.
        if len(lengths) > 1 or (self.is_unfinished and self.state_layers):
            raise InputError(INTERRUPTED)
        self.ranks.check_capacity(length)

    def __bool__(self) -> bool:
        """False if it is empty. Phi-3's code drops a cache with few tokens before a long text, but not an empty one."""
        return bool(self.fed_layers) or any(any(layer.has_previous_state.values()) for layer in self.state_layers)

    @property
    def fed_layers(self) -> list[Any]:
        """The layers that hold keys. A model may never feed some: those of the encoder that its configuration has."""
        return [layer for layer in self.key_layers if layer.length]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return LengthInChunk() if self.in_chunk else super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """For masks, which are rules over slots."""
        return super().get_seq_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.state_layers:
            if not layer.record_past:
                raise Unsupported(f"{type(layer).__name__} cannot forget tokens: load a save, or read again")
        super().crop(int(tokens_to_remove))  # transformers 5.17 passes a tensor, and lengths are the host's

    def reset(self) -> None:
        super().reset()
        self.is_unfinished, self.first_fed = False, None
        self.exchange.recover()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows `indices`, in this order."""
        layers: list[Any] = self.layers
        for layer in layers:
            if type(layer) is LinearAttentionLayer:  # it has only this method
                layer.reorder_cache(indices)
            else:
                layer.batch_select_indices(indices)
        if self.state_layers:
            self.step_state.buffers_changed()  # a captured step reads the memory of states

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = next((layer.rows for layer in self.fed_layers), 0)
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def reserve(self, tokens: int) -> None:
        """Make the next growth allocate at least `tokens` tokens over all ranks, so that buffers grow once."""
        for layer in self.key_layers:
            layer.reserved = max(layer.reserved, tokens)

    @property
    def in_chunk(self) -> bool:
        """True inside `parallel_chunk`."""
        return bool(self.key_layers) and self.key_layers[0].chunk is not None

    @contextlib.contextmanager
    def parallel_chunk(self, start: int, stop: int) -> Iterator[Tensor]:
        """Inside, each rank feeds only its own slots of `start .. stop - 1`: the ones yielded, int64, ascending."""
        for layer in self.key_layers:
            layer.chunk = (start, stop)
        try:
            yield self.ranks.slots(start, stop)
        finally:
            for layer in self.key_layers:
                layer.chunk = None

    def can_step(self, tokens: int, attention_mask: Tensor | None = None) -> bool:
        """True if the next tokens can be fed without the host: a static cache, not empty, and layers that all can."""
        most = 1 if self.state_layers else MAX_STEP_TOKENS
        if self.ranks.max_tokens is None or not self.fed_layers or not 0 < tokens <= most:
            return False
        if self.rule_needs_padding and self.step_state.cursor_is_stale and not _is_all_true(attention_mask):
            return False
        return not any(getattr(layer, "record_past", False) for layer in self.layers)

    def begin_step(self, batch: int, tokens: int, device: torch.device, attention_mask: Tensor | None) -> Cursor:
        """Prepare a step of `tokens` tokens in each of `batch` rows; return the cursor. All ranks call it together.

        attention_mask: as `generate` passes it. It is only read if the cursor must be set: that waits for the device.
        """
        state, length = self.step_state, self.get_seq_length()
        if self.exchange.stopped is not None:
            raise self.exchange.stopped
        self.ranks.check_capacity(length + tokens)
        must_set = self.is_unfinished or state.needs_cursor(batch)  # an unfinished step may have advanced the cursor
        if (must_set or tokens > 1) and self.exchange.link_for_steps(batch, tokens, device):
            state.buffers_changed()
        if must_set:
            self.check_ready(length + tokens)
            if attention_mask is not None:
                attention_mask = None if _is_all_true(attention_mask) else attention_mask.bool()
            for layer in self.fed_layers:
                layer.begin_steps()
            state.set_cursor(length, batch, device, attention_mask)
        self.is_unfinished = True
        return state.cursor

    def end_step(self, tokens: int) -> None:
        """Count the step's tokens on the host."""
        for layer in self.fed_layers:
            layer.count(tokens)
        self.is_unfinished = False

    def can_take_back(self) -> bool:
        """True if the cache can forget the last tokens that it was fed in one step, without copying anything."""
        return not self.state_layers and all(layer.can_take_back() for layer in self.fed_layers)

    def take_back(self, tokens: int) -> None:
        """Forget the last `tokens` tokens. All ranks call it together."""
        for layer in self.fed_layers:
            layer.take_back(tokens)
        self.step_state.move_cursor(self.get_seq_length())

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that this rank has allocated."""
        buffers = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(buffer.nbytes for buffer in buffers if isinstance(buffer, Tensor))

    @property
    def received_bytes(self) -> float:
        """Bytes that this rank received for attention so far."""
        return self.exchange.received_bytes


def _is_all_true(mask: Any) -> bool:
    return not isinstance(mask, Tensor) or bool(mask.all())
