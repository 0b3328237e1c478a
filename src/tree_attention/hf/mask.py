"""`LazyMask`: a mask as a rule, not a tensor. It is evaluated only for queries and keys that meet on this rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..errors import Unsupported
from .refusing import Refusing


class MaskIsRead(Unsupported, AttributeError):
    """A model looks at its mask. Also an AttributeError: `hasattr` is False, for libraries that look for tensors."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the model looks at its attention mask ({what}), which is not supported: load this model with another "
            "attn_implementation, and use transformers' own cache"
        )


@dataclass(frozen=True, eq=False)
class LazyMask(Refusing):
    """The mask that transformers passes from its mask function to the attention function."""

    rule: Callable[..., Any]  # transformers' function (batch, head, query slot, key slot) -> bool, over index tensors
    padding: Tensor | None  # bool `[B, slots]`, True for real tokens
    first_query: int = 0  # the first slots of a layer without our cache
    first_key: int = 0
    rows: slice | None = None  # the queries of the forward pass that the mask covers; None for all
    ndim: int = 4  # some models check that a mask is 4-D

    @property
    def is_causal_only(self) -> bool:
        """True if the only rule is that a query sees the slots up to its own."""
        return self.rule is causal_mask_function and self.padding is None

    def build(self, query_slots: Tensor, key_slots: Tensor, batch: int) -> Tensor:
        """Return the mask, bool `[batch or 1, 1, T, S]`, for query slots `[T]` and key slots `[S]`."""
        at = torch.arange(batch, device=query_slots.device)[:, None, None, None]
        head = torch.zeros(1, dtype=torch.long, device=query_slots.device)[None, :, None, None]
        visible = self.rule(at, head, query_slots[None, None, :, None], key_slots[None, None, None, :])
        if self.padding is not None:
            real = self.padding[:, key_slots.clamp(0, self.padding.shape[1] - 1)]
            visible = visible & real[:, None, None, :]
        return visible.expand(-1, -1, len(query_slots), len(key_slots))

    def __getitem__(self, index: Any) -> "LazyMask":
        """Support `mask[:, :, -n:, :]`, which Gemma 4 uses: the same rule for fewer queries."""
        whole = slice(None)
        if self.rows is not None or not isinstance(index, tuple) or len(index) != 4 or not isinstance(index[2], slice):
            raise MaskIsRead("an index")
        if (index[0], index[1], index[3]) != (whole, whole, whole):
            raise MaskIsRead("an index")
        return replace(self, rows=index[2])

    def contiguous(self) -> "LazyMask":
        return self

    def to(self, *_: Any, **__: Any) -> "LazyMask":
        return self

    @classmethod
    def error(cls, what: str) -> MaskIsRead:
        return MaskIsRead(what)


def lazy_mask(
    *,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> LazyMask:
    """The function that `AttentionMaskInterface` calls, once per kind of layer in a forward pass."""
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    return LazyMask(mask_function, attention_mask, q_offset, kv_offset)
