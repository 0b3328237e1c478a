"""`AttentionCall`, the checked arguments of `attend`, with its `KeySelection`: which keys each query may see."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..partial import PartialSpec, partial_dtype

INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class KeySelection:
    """Which keys each query may see; fields as in `attend`, but positions are `[B or 1, tokens]`."""

    local_seqlens: Tensor | None = None
    page_table: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    mask: Tensor | None = None
    window: int | None = None
    causal: bool = False

    @property
    def tensors(self) -> list[Tensor | None]:
        """The tensors, which are the first fields, in the order of the kernels' arguments."""
        return [self.local_seqlens, self.page_table, self.q_positions, self.k_positions, self.mask]

    @property
    def row_lengths(self) -> Tensor | None:
        """Number of keys of each row, `[B]`: those that its last query sees."""
        lengths = self.local_seqlens
        return lengths if lengths is None or lengths.ndim == 1 else lengths[:, -1]

    @property
    def has_rules(self) -> bool:
        """True if a rule other than `causal`, which fused operators apply without a mask, may hide keys."""
        return any(rule is not None for rule in (self.local_seqlens, self.k_positions, self.mask))

    def visible(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return bool `[B or 1, H or 1, T, S_local]`, True where a query may see a key; None if all are visible."""
        conditions = []
        if self.causal:
            conditions.append(torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=k.device).tril()[None, None])
        if self.local_seqlens is not None:
            lengths = self.local_seqlens if self.local_seqlens.ndim == 2 else self.local_seqlens[:, None]
            conditions.append((torch.arange(k.shape[1], device=k.device) < lengths.to(k.device)[:, :, None])[:, None])
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

    def in_order(self, cache: Tensor) -> Tensor:
        """Gather pages to `[B, S_local, H_kv, D]`, zero past the lengths. Copies if there are lengths.

        Zero, because a mask hides finite values only: 0 * NaN is NaN.
        """
        lengths = self.row_lengths
        if lengths is None:
            return cache
        if self.page_table is not None:
            cache = cache[self.page_table.clamp(0, cache.shape[0] - 1)].flatten(1, 2)
        unused = torch.arange(cache.shape[1], device=cache.device) >= lengths.to(cache.device)[:, None]
        return cache.masked_fill(unused[:, :, None, None], 0.0)


class AttentionCall(NamedTuple):
    """The arguments of `attend`, checked; every backend takes this one value."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S_local, H_kv, D], or pages of it
    v: Tensor  # [B, S_local, H_kv, D_v], or pages of it
    selection: KeySelection
    scale: float
    softcap: float | None

    def spec(self) -> PartialSpec:
        """Return the shape, dtype and device of the Partial that the call gives."""
        return PartialSpec((*self.q.shape[:3], self.v.shape[3]), partial_dtype(self.q.dtype), self.q.device)

    def is_empty(self) -> bool:
        """Return True if there is no query or no key."""
        return self.k.shape[0] * key_count(self.k, self.selection.page_table) == 0 or self.q.numel() == 0

    def in_order(self) -> "AttentionCall":
        """Return the same call with keys and values gathered from their pages; see `KeySelection.in_order`."""
        k, v = self.selection.in_order(self.k), self.selection.in_order(self.v)
        return AttentionCall(self.q, k, v, self.selection, self.scale, self.softcap)


def check_call(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, softcap: float | None = None, **rules: Any
) -> AttentionCall:
    """Check the arguments of `attend`, raising InputError, and return them as one value. rules: as in `select`."""
    _check_tensors(q, k, v, paged=rules.get("page_table") is not None)
    if scale is not None and not scale > 0:
        raise InputError(f"scale must be positive, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"softcap must be positive and finite, or None, got {softcap}")
    return AttentionCall(q, k, v, select(q, k, **rules), q.shape[-1] ** -0.5 if scale is None else scale, softcap)


def key_count(k: Tensor, page_table: Tensor | None) -> int:
    """Return S_local, the number of keys that a row can have in k, or in the pages of its page table."""
    return k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]


def select(q: Tensor, k: Tensor, **rules: Any) -> KeySelection:
    """Check `rules`, the fields of a KeySelection, for q `[B, T, H, D]` and k `[B, S_local, H_kv, D]`, or its pages."""
    given = KeySelection(**rules)
    if given.page_table is not None:
        _check_page_table(given.page_table, q, given.local_seqlens)
    if given.local_seqlens is not None:
        _check_lengths(given.local_seqlens, q, k, given.page_table)
    q_positions, k_positions, keys = given.q_positions, given.k_positions, key_count(k, given.page_table)
    if (q_positions is None) != (k_positions is None):
        raise InputError("q_positions and k_positions must be given together, or neither")
    if q_positions is not None and k_positions is not None:
        rules["q_positions"] = _rows("q_positions", q_positions, q.shape[0], q.shape[1], q.device)
        rules["k_positions"] = _rows("k_positions", k_positions, q.shape[0], keys, k.device)
    if given.window is not None and (q_positions is None or given.window < 1):
        raise InputError(f"window must be at least 1, and needs q_positions and k_positions, got {given.window}")
    if given.causal and (q.shape[1] != keys or q_positions is not None):
        raise InputError(f"causal needs a key for each query and no positions, got {q.shape[1]} queries, {keys} keys")
    if given.mask is not None:
        _check_mask(given.mask, q, keys)
    rules["causal"] = given.causal and q.shape[1] > 1
    return KeySelection(**rules) if given.causal or q_positions is not None else given


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, *, paged: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise InputError(f"{name} must be 4-D [B, tokens, heads, head_dim], got {tuple(tensor.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"q, k and v must be float64, float32, bfloat16 or float16, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise InputError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if k.shape[:3] != v.shape[:3]:
        raise InputError(f"k and v must agree in [B, S_local, H_kv], got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}")
    if not paged and q.shape[0] != k.shape[0]:
        raise InputError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise InputError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    if k.shape[3] == 0 or v.shape[3] == 0:
        raise InputError(f"head dims must be at least 1, got {k.shape[3]} of k and {v.shape[3]} of v")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise InputError(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")


def _check_page_table(page_table: Tensor, q: Tensor, local_seqlens: Tensor | None) -> None:
    shape_fits = page_table.ndim == 2 and page_table.shape[0] == q.shape[0]
    if not shape_fits or page_table.dtype not in INTEGERS or page_table.device != q.device:
        got = f"{page_table.dtype} {list(page_table.shape)} on {page_table.device}"
        raise InputError(f"page_table must be int32 or int64 [{q.shape[0]}, max_pages] on {q.device}, got {got}")
    if local_seqlens is None:
        raise InputError("page_table needs local_seqlens: how many keys of each row there are")


def _check_lengths(local_seqlens: Tensor, q: Tensor, k: Tensor, page_table: Tensor | None) -> None:
    """Check the shape; on the CPU also the values, which on a GPU would need a synchronization."""
    if local_seqlens.shape not in (q.shape[:1], q.shape[:2]) or local_seqlens.dtype not in INTEGERS:
        got, (B, T) = f"{local_seqlens.dtype} {list(local_seqlens.shape)}", q.shape[:2]
        raise InputError(f"local_seqlens must be int32 or int64 [{B}] or [{B}, {T}], got {got}")
    if local_seqlens.device.type != "cpu" or not local_seqlens.numel() or torch.compiler.is_compiling():
        return
    low, high, keys = int(local_seqlens.min()), int(local_seqlens.max()), key_count(k, page_table)
    if low < 0 or high > keys:
        raise InputError(f"local_seqlens must be between 0 and S_local = {keys}, got {low} to {high}")
    if local_seqlens.ndim == 2:
        if (local_seqlens.diff() < 0).any():
            raise InputError("local_seqlens must not decrease along a row: a query sees what the one before it sees")
        local_seqlens = local_seqlens[:, -1]
    if page_table is not None and page_table.device.type == "cpu":
        begins = torch.arange(page_table.shape[1]) * k.shape[1]
        used = page_table[begins < local_seqlens[:, None]]
        if ((used < 0) | (used >= k.shape[0])).any():
            raise InputError(f"page_table must name pages 0 to {k.shape[0] - 1} within a row's length")


def _rows(name: str, positions: Tensor, B: int, n: int, device: torch.device) -> Tensor:
    """Return positions as int64 `[B or 1, tokens]`: a window reaches below 0, where narrow types would wrap around."""
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
