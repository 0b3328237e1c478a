"""`KeyLayer`: a layer of a TreeCache that holds keys. `ShardedLayer`: one whose keys are spread over the ranks."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from .cursor import StepState, any_length, stepping_layers
from .exchange import CacheExchange, CacheRanks

_last_update: ContextVar["tuple[int, KeyLayer] | None"] = ContextVar("_last_update", default=None)


class KeyLayer(DynamicLayer):
    """What `ShardedLayer` and `ReplicatedWindowLayer` (window_layer.py) have in common.

    Both also have `begin_steps`, which prepares the buffers for steps; `export_state` and `import_state`, which copy
    what the layer holds into a new one; and `undo_point`, which returns a function that restores what it holds now.
    """

    keys: Any  # Tensor, or None before the first update
    values: Any

    def __init__(self, ranks: CacheRanks, exchange: CacheExchange, step_state: StepState, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ranks, self.exchange, self.step_state = ranks, exchange, step_state
        self.chunk: tuple[int, int] | None = None  # slots (start, stop) of which each rank is fed its own
        self.length = self.last_update_tokens = 0  # in slots over all ranks
        self.reserved = 0  # slots over all ranks to allocate when the buffers next grow; set by `TreeCache.reserve`

    def tokens_in(self, key_states: Tensor) -> int:
        """Number of new slots over all ranks when this rank is fed `key_states`."""
        return key_states.shape[2] if self.chunk is None else self.chunk[1] - self.chunk[0]

    def query_slots(self, device: torch.device) -> Tensor:
        """The slots of the last update's tokens on this rank."""
        if self.chunk is not None:
            return self.ranks.slots(*self.chunk, device)
        return torch.arange(self.length - self.last_update_tokens, self.length, device=device)

    def count(self, tokens: int) -> None:
        """Add `tokens` slots to the length."""
        self.last_update_tokens, self.length = tokens, self.length + tokens

    def can_take_back(self) -> bool:
        """True if `take_back` can forget the last tokens of a step."""
        return True

    def take_back(self, tokens: int) -> None:
        """Forget the last `tokens` tokens; `TreeCache.take_back` moves the cursor."""
        self.length -= tokens

    @property
    def rows(self) -> int:
        """Number of batch rows, 0 before the first update."""
        return self.keys.shape[0] if self.is_initialized else 0

    def _set_length(self, length: int) -> None:
        self.length = length
        self.step_state.invalidate_cursor()

    def get_seq_length(self) -> Any:
        """Number of slots; during a step the number before it, as a tensor, for models that compute with it."""
        return self.step_state.cursor.slots[0] if self.step_state.is_stepping else self.length

    def sizes_in_step(self) -> tuple[int, int]:
        """A bound on the slots: our mask is a rule, but some models prepare a number for each slot."""
        return (self.step_state.cursor.key_slots.shape[0] + self.ranks.layout.block) * self.ranks.layout.world_size, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Free the keys (transformers 5.17 would keep a window, filled with zeros)."""
        self.keys = self.values = None
        self.is_initialized, self.length, self.last_update_tokens = False, 0, 0
        self.step_state.invalidate_cursor()


class ShardedLayer(KeyLayer):
    """Full attention: holds slots `layout.slots(0, length, rank)`, in buffers `[B, H_kv, capacity, D]` that grow."""

    @property
    def held(self) -> int:
        """Number of slots on this rank."""
        return self.ranks.held(self.length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = torch.promote_types(key_states.dtype, value_states.dtype), key_states.device
        self.keys, self.values = (_resized(t[:, :, :0].to(self.dtype), 1) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens that this rank owns; return all that it holds, or one unused key if it holds none.

        (Some models, such as DeepSeek's, cannot reshape an empty tensor. The attention function drops the unused key.)
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.step_state.is_stepping:
            for buffer, new in ((self.keys, key_states), (self.values, value_states)):
                buffer.index_copy_(2, self.step_state.cursor.places, fitted(new, buffer))
            return self.keys[:, :, :-1], self.values[:, :, :-1]
        before, old, tokens = self.length, self.held, self.tokens_in(key_states)
        held = self.ranks.held(before + tokens)
        self.step_state.invalidate_cursor()
        self._widen(torch.promote_types(key_states.dtype, value_states.dtype))
        if held > old:
            self.grow(held)
            if held - old < key_states.shape[2]:
                mine = self.ranks.slots(before, before + tokens, key_states.device) - before
                key_states, value_states = key_states[:, :, mine], value_states[:, :, mine]
            self.keys[:, :, old:held] = key_states
            self.values[:, :, old:held] = value_states
        self.count(tokens)  # last: a layer that runs out of memory has not read the tokens
        shown = max(self.held, 1)
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def _widen(self, dtype: torch.dtype) -> None:
        """Let the buffers hold numbers of `dtype`, as transformers' cache does: some calls may run under autocast."""
        self.dtype = torch.promote_types(dtype, self.dtype)
        if self.dtype != self.keys.dtype:
            with torch.inference_mode(False):  # as in `_resized`
                self.keys, self.values = self.keys.to(self.dtype), self.values.to(self.dtype)
            self.step_state.buffers_changed()

    def grow(self, needed: int) -> None:
        """Make the buffers hold `needed` slots: a static cache's capacity, the reserve, or 1/64 (at least 64) more."""
        is_static = self.ranks.max_tokens is not None
        if needed <= self.keys.shape[2] - is_static:
            return
        if is_static:
            capacity = self.ranks.static_capacity + 1  # the last place is never read
            self.keys, self.values = (any_length(_resized(t, capacity), 2) for t in (self.keys, self.values))
        else:
            reserved = self.ranks.held(self.reserved)
            capacity = reserved if reserved >= needed else needed + max(64, needed // 64)
            self.keys, self.values = _resized(self.keys, capacity), _resized(self.values, capacity)
        self.step_state.buffers_changed()

    def begin_steps(self) -> None:
        self.grow(1)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        buffers = {"keys": self.keys, "values": self.values} if self.is_initialized else {}
        return {name: buffer[:, :, : self.held] for name, buffer in buffers.items()}, {"length": self.length}

    def import_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        self.count(plain["length"])
        if tensors:
            self.lazy_initialization(tensors["keys"], tensors["values"])
            self.grow(self.held)
            self.keys[:, :, : self.held] = tensors["keys"]
            self.values[:, :, : self.held] = tensors["values"]

    def undo_point(self) -> Callable[[], None]:
        return functools.partial(self._set_length, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.step_state.is_stepping:
            return self.sizes_in_step()
        return (self.length + query_length if self.chunk is None else self.chunk[1]), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self._set_length(max(self.length + tokens_to_remove, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda buffer: buffer[indices.to(buffer.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda buffer: buffer.repeat_interleave(repeats, 0))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Write to the same memory if the batch size stays the same."""
        if not self.is_initialized:
            return
        with torch.inference_mode(False):  # as in `_resized`
            keys, values = change(self.keys), change(self.values)
        if keys.shape == self.keys.shape:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
            self.step_state.buffers_changed()


def _resized(buffer: Tensor, capacity: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor created in inference mode could not be written to outside it later
        resized = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[3]))
    resized[:, :, : buffer.shape[2]] = buffer
    return resized


def fitted(new: Tensor, buffer: Tensor) -> Tensor:
    """Return `new` in the buffer's dtype, which may be wider, as under autocast; a step cannot widen the buffer."""
    if new.dtype == buffer.dtype:
        return new
    if torch.promote_types(new.dtype, buffer.dtype) != buffer.dtype:
        raise InputError(
            f"a step of a static TreeCache that holds {buffer.dtype} got keys in {new.dtype}: make all calls inside "
            "torch.autocast, or none of them"
        )
    return new.to(buffer.dtype)


def keep_writable(layer: Any) -> Any:
    """Make a layer of transformers' create its states outside of inference mode, as `_resized` does. Return it."""
    for name in ("lazy_initialization", "reorder_cache"):
        if hasattr(layer, name):
            setattr(layer, name, torch.inference_mode(False)(getattr(layer, name)))
    return layer


def mark(key: Tensor, layer_idx: int, layer: KeyLayer) -> None:
    """Note that `key` came out of `layer`, because transformers does not pass the cache to the attention function.

    `layer_of` finds the layer on the key tensor, which other modules may share, or in a context variable for models
    that rebuild their keys (latent attention). torch.compile cannot read that; it uses `stepping_layers`.
    """
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
