"""What transformers calls in every attention layer: local attention, the reduction, sinks, one rounding."""

from typing import Any

import torch
from torch import Tensor

from ..decode import add_sinks
from ..errors import InputError, Unsupported
from ..local import attend
from ..partial import Partial
from .cache import layer_behind
from .chunk import attend_chunk, attend_seen_and_new
from .layers import ReplicatedWindowLayer, ShardedLayer
from .mask import LazyMask, lazy_mask


def tree_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query `[B, H, T, D]`, key `[B, H_kv, S_local, D]`, value `[B, H_kv, S_local, D_v]` -> (`[B, T, H, D_v]`, None).

    s_aux: `[H]`, attention sinks. Everything that changes the result and is not named here raises Unsupported.
    """
    _refuse(dropout, others)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    how: dict[str, Any] = {"scale": scaling, "softcap": softcap}
    layer = layer_behind(module, key)
    if layer is not None and layer.placement.is_stepping:
        return _step(layer, q, k, v, attention_mask, s_aux, how).contiguous(), None
    if isinstance(layer, ShardedLayer):
        mask = lazy_mask() if attention_mask is None else _over_slots(attention_mask, layer.length)
        if layer.held < k.shape[1]:  # it holds nothing, and showed an unused key
            k, v = k[:, :0], v[:, :0]
        total = _over_ranks(layer, q, k, v, mask, how)
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        total = attend(q, k, v, mask=_local_mask(layer, q, k, attention_mask, causal), **how)
    if s_aux is not None:
        total = add_sinks(total, s_aux)
    return total.out.to(query.dtype).contiguous(), None


def _step(
    layer: ShardedLayer | ReplicatedWindowLayer, q: Tensor, k: Tensor, v: Tensor, mask: LazyMask | Tensor | None,
    sinks: Tensor | None, how: dict[str, Any],
) -> Tensor:  # fmt: skip
    """A decode step that goes by the cursor; k and v are whole buffers, of which it tells what counts."""
    placement, cursor = layer.placement, layer.placement.stepping_cursor
    mask = mask if isinstance(mask, LazyMask) else lazy_mask()  # a step is not given a tensor
    if isinstance(layer, ShardedLayer):
        return placement.step_over(q, k, v, cursor.mask_of_shard(mask), sinks=sinks, **how)
    total = attend(q, k, v, mask=cursor.mask_of_ring(mask, k.shape[1]), **how)
    return (total if sinks is None else add_sinks(total, sinks)).out.to(q.dtype)


def _over_ranks(layer: ShardedLayer, q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, how: dict[str, Any]) -> Partial:
    """Attention of q over what all ranks hold."""
    placement, B = layer.placement, q.shape[0]
    layout, rank = placement.layout, placement.rank

    def build(query_slots: Tensor, key_slots: Tensor) -> Tensor:
        return mask.build(query_slots, key_slots, B)

    if placement.chunk is not None and placement.group is not None:
        total, received = attend_chunk(
            q, k, v, chunk=placement.chunk, layout=layout, group=placement.group,
            build_mask=build, causal_only=mask.is_causal_only, **how,
        )  # fmt: skip
        placement.received_bytes += received
        return total
    if mask.is_causal_only and q.shape[1] == 1:  # the newest token sees every key there is
        partial = attend(q, k, v, **how)
    else:
        start = layer.length - layer.fed
        seen = layout.local_length(start, rank)
        partial = attend_seen_and_new(
            q, k, v,
            seen=seen,
            query_slots=torch.arange(start, layer.length, device=q.device)[mask.rows or slice(None)],
            key_slots=layout.slots(0, layer.length, rank, device=q.device),
            build_mask=build, causal_only=mask.is_causal_only,
            all_here=mask.rows is None and k.shape[1] - seen == layer.fed, **how,
        )  # fmt: skip
    return placement.reduce(partial)


def _local_mask(
    layer: ReplicatedWindowLayer | None, q: Tensor, k: Tensor, mask: LazyMask | Tensor | None, is_causal: bool
) -> Tensor | None:
    """The mask of a layer whose keys are whole on this rank: a window, or no cache of ours at all."""
    T, S = q.shape[1], k.shape[1]
    if mask is None:
        mask = lazy_mask(q_offset=S - T) if is_causal and T > 1 else None
    if not isinstance(mask, LazyMask):
        return None if mask is None else _boolean(mask, S)
    if layer is None:
        query_slots = torch.arange(mask.first_query, mask.first_query + T, device=q.device)
        first_key = mask.first_key
    else:
        chunk, placement = layer.placement.chunk, layer.placement
        if chunk is None:
            query_slots = torch.arange(layer.length - layer.fed, layer.length, device=q.device)[
                mask.rows or slice(None)
            ]
        else:
            query_slots = placement.layout.slots(*chunk, placement.rank, device=q.device)
        first_key = layer.length - S
    return mask.build(query_slots, torch.arange(first_key, first_key + S, device=q.device), q.shape[0])


def _over_slots(mask: LazyMask | Tensor, slots: int) -> LazyMask:
    """A mask tensor `[B or 1, 1, T, slots]` of the caller's as a rule over slots."""
    if isinstance(mask, LazyMask):
        return mask
    allowed = _boolean(mask, slots)
    first_query = slots - allowed.shape[2]

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch.clamp(max=allowed.shape[0] - 1)
        return allowed[row, 0, query - first_query, key]

    return LazyMask(rule, None)


def _boolean(mask: Tensor, keys: int) -> Tensor:
    if mask.dtype != torch.bool:
        raise Unsupported(f"a 4-D attention_mask must be bool (True: may attend), got {mask.dtype}: pass mask >= 0")
    if mask.shape[1] != 1:
        raise Unsupported(f"a 4-D attention_mask must be the same for all heads [B, 1, T, S], got {list(mask.shape)}")
    if mask.shape[3] != keys:
        raise InputError(f"a 4-D attention_mask must have a column for each of {keys} keys, got {list(mask.shape)}")
    return mask


def _refuse(dropout: float, others: dict[str, Any]) -> None:
    if dropout:
        raise Unsupported(f"tree_attention has no dropout, got {dropout}: call model.eval(), or train with 'sdpa'")
    if others.get("cache") is not None:
        raise Unsupported("continuous batching (generate_batch) is not supported: use model.generate")
    for name in ("position_bias", "indices", "block_indices", "sinks"):
        if others.get(name) is not None:
            raise Unsupported(
                f"attention with {name!r} is not supported: load this model with another attn_implementation"
            )
