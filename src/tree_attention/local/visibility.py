"""Which keys a query may see: lengths, the causal rule over positions, a window, and a mask of the caller's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Selection:
    """Which of the keys a query may see, as in `attend`, and in which pages they lie; all where nothing is said.

    Positions are `[B or 1, tokens]` here.
    """

    local_seqlens: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    window: int | None = None
    mask: Tensor | None = None
    page_table: Tensor | None = None
    causal: bool = False

    @property
    def is_everything(self) -> bool:
        """Every query sees every key."""
        return not self.causal and not self._has_rules

    @property
    def is_causal_only(self) -> bool:
        """The causal rule and no other: fused operators know it without a mask."""
        return self.causal and not self._has_rules

    @property
    def _has_rules(self) -> bool:
        return any(rule is not None for rule in (self.local_seqlens, self.k_positions, self.mask))

    def visible(self, q: Tensor, k: Tensor) -> Tensor | None:
        """bool `[B or 1, H or 1, T, S_local]`, True where a query may see a key; None if every query sees every key."""
        conditions = []
        if self.causal:
            conditions.append(torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=k.device).tril()[None, None])
        if self.local_seqlens is not None:
            keys = torch.arange(k.shape[1], device=k.device)
            conditions.append((keys < self.local_seqlens.to(k.device)[:, None])[:, None, None, :])
        if self.q_positions is not None and self.k_positions is not None:
            queries, keys = self.q_positions[:, None, :, None], self.k_positions[:, None, None, :]
            conditions.append(keys <= queries)
            if self.window is not None:
                conditions.append(keys > queries - self.window)
        if self.mask is not None:
            conditions.append(self.mask)
        if not conditions:
            return None
        visible = conditions[0]
        for condition in conditions[1:]:
            visible = visible & condition
        return visible.expand(-1, -1, q.shape[1], -1)


def keys_of(k: Tensor, page_table: Tensor | None) -> int:
    """S_local: the keys that a row can have in k `[B, S_local, H_kv, D]`, or in pages `[pages, page_size, H_kv, D]`."""
    return k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]


def select(
    q: Tensor,
    k: Tensor,
    *,
    local_seqlens: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = False,
) -> Selection:
    """The arguments of `attend`, checked; q `[B, T, H, D]`, k `[B, S_local, H_kv, D]` or pages of it."""
    keys = keys_of(k, page_table)
    if (q_positions is None) != (k_positions is None):
        raise InputError("q_positions and k_positions must be given together, or neither")
    if q_positions is not None and k_positions is not None:
        q_positions = _rows("q_positions", q_positions, q.shape[0], q.shape[1], q.device)
        k_positions = _rows("k_positions", k_positions, q.shape[0], keys, k.device)
    if window is not None and (q_positions is None or window < 1):
        raise InputError(f"window must be at least 1, and needs q_positions and k_positions, got {window}")
    if causal and (q.shape[1] != keys or q_positions is not None):
        raise InputError(f"causal needs a key for each query and no positions, got {q.shape[1]} queries, {keys} keys")
    if mask is not None:
        _check_mask(mask, q, keys)
    return Selection(local_seqlens, q_positions, k_positions, window, mask, page_table, causal and q.shape[1] > 1)


def _rows(name: str, positions: Tensor, B: int, n: int, device: torch.device) -> Tensor:
    """positions as int64 `[B or 1, tokens]`: a window reaches below 0, where narrow types would begin again."""
    if positions.is_floating_point() or tuple(positions.shape) not in ((n,), (1, n), (B, n)):
        raise InputError(f"{name} must be integers [{n}] or [{B}, {n}], got {positions.dtype} {list(positions.shape)}")
    if positions.device != device:
        raise InputError(f"{name} must be on {device}, got {positions.device}")
    return (positions if positions.ndim == 2 else positions[None]).long()


def _check_mask(mask: Tensor, q: Tensor, S: int) -> None:
    B, T, H = q.shape[:3]
    fits = mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, H) and tuple(mask.shape[2:]) == (T, S)
    if mask.dtype != torch.bool or not fits:
        raise InputError(f"mask must be bool [{B} or 1, {H} or 1, {T}, {S}], got {mask.dtype} {list(mask.shape)}")
    if mask.device != q.device:
        raise InputError(f"mask must be on {q.device}, got {mask.device}")
