"""Which keys a query may see, as one mask: lengths, the causal rule over positions, and a mask of the caller's."""

import torch
from torch import Tensor

from ..errors import InputError


def visible_keys(
    q: Tensor,
    k: Tensor,
    local_seqlens: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    mask: Tensor | None,
) -> Tensor | None:
    """bool `[B or 1, H or 1, T, S_local]`, True where a query may see a key; None if every query sees every key."""
    conditions = []
    if local_seqlens is not None:
        keys = torch.arange(k.shape[1], device=k.device)
        conditions.append((keys < local_seqlens.to(k.device)[:, None])[:, None, None, :])
    if (q_positions is None) != (k_positions is None):
        raise InputError("q_positions and k_positions must be given together, or neither")
    if q_positions is not None and k_positions is not None:
        queries = _rows("q_positions", q_positions, q)
        conditions.append(_rows("k_positions", k_positions, k)[:, None, None, :] <= queries[:, None, :, None])
    if mask is not None:
        _check_mask(mask, q, k)
        conditions.append(mask)
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible.expand(-1, -1, q.shape[1], -1)


def _rows(name: str, positions: Tensor, tokens: Tensor) -> Tensor:
    """positions as `[B or 1, tokens]`."""
    B, n = tokens.shape[:2]
    if positions.is_floating_point() or tuple(positions.shape) not in ((n,), (1, n), (B, n)):
        raise InputError(f"{name} must be integers [{n}] or [{B}, {n}], got {positions.dtype} {list(positions.shape)}")
    if positions.device != tokens.device:
        raise InputError(f"{name} must be on {tokens.device}, got {positions.device}")
    return positions if positions.ndim == 2 else positions[None]


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    B, T, H = q.shape[:3]
    S = k.shape[1]
    fits = mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, H) and tuple(mask.shape[2:]) == (T, S)
    if mask.dtype != torch.bool or not fits:
        raise InputError(f"mask must be bool [{B} or 1, {H} or 1, {T}, {S}], got {mask.dtype} {list(mask.shape)}")
    if mask.device != q.device:
        raise InputError(f"mask must be on {q.device}, got {mask.device}")
