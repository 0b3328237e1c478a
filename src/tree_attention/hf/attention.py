"""The attention function that transformers calls in each layer: local attention, reduction, sinks, one rounding."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.utils import output_capturing

from ..decode import run
from ..errors import InputError, Unsupported
from ..local import attend
from ..partial import Partial, add_sinks
from ..route import resolve
from .layers import KeyLayer, ShardedLayer, layer_of
from .mask import LazyMask, lazy_mask
from .prefill_attention import Options, attend_chunk, attend_seen_and_new


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

    s_aux: `[H]`, attention sinks. Any other argument that would change the result raises Unsupported.
    """
    _check_supported(dropout, others)
    if torch.is_autocast_enabled(query.device.type):  # it casts what we sum in float32
        how = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, "is_causal": is_causal}
        with torch.autocast(query.device.type, enabled=False):
            return tree_attention_forward(module, query, key, value, attention_mask, **how)
    layer, dtype = layer_of(module, key), query.dtype
    if not dtype == key.dtype == value.dtype:  # calls inside autocast and outside it
        common = torch.promote_types(torch.promote_types(dtype, key.dtype), value.dtype)
        query, key, value = query.to(common), key.to(common), value.to(common)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options: Options = {"scale": scaling, "softcap": softcap}
    if layer is not None and layer.step_state.is_stepping:
        return _attend_step(layer, q, k, v, attention_mask, s_aux, options).to(dtype).contiguous(), None
    if isinstance(layer, ShardedLayer):
        mask = lazy_mask() if attention_mask is None else _as_rule(attention_mask, layer.length)
        if layer.held < k.shape[1]:  # the layer holds nothing, and returned an unused key
            k, v = k[:, :0], v[:, :0]
        total = _attend_over_ranks(layer, q, k, v, mask, options)
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        total = attend(q, k, v, mask=_local_mask(layer, q, k, attention_mask, causal), **options)
    if s_aux is not None:
        total = add_sinks(total, s_aux)
    return total.out.to(dtype).contiguous(), None


def _attend_step(layer: KeyLayer, q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Any, options: Options) -> Tensor:
    """A decode step's attention `[B, 1, H, D_v]`; k and v are whole buffers, of which the cursor says what is valid."""
    cursor = layer.step_state.cursor
    mask = mask if isinstance(mask, LazyMask) else lazy_mask()  # a step is never given a tensor
    if isinstance(layer, ShardedLayer):
        options |= {"mask": cursor.mask_of_shard(mask), "local_seqlens": cursor.held, "sinks": sinks}
        call, route = resolve(q, k, v, group=layer.exchange.target, backend="auto", algorithm="auto", **options)
        if not torch.compiler.is_compiling():
            layer.exchange.count(route.received_bytes)
        return run(call, route, sinks)
    total = attend(q, k, v, mask=cursor.mask_of_ring(mask, k.shape[1]), **options)
    return (total if sinks is None else add_sinks(total, sinks)).out.to(q.dtype)


def _attend_over_ranks(layer: KeyLayer, q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, options: Options) -> Partial:
    """Attention of q over the keys of all ranks."""
    ranks, is_causal, build = layer.ranks, mask.is_causal_only, functools.partial(mask.build, batch=q.shape[0])

    def own_mask(seen: int) -> Tensor:
        query_slots = layer.query_slots(q.device)[mask.rows or slice(None)]
        return build(query_slots, ranks.slots(0, layer.length, q.device)[seen:])

    if layer.chunk is not None and ranks.group is not None:
        build_mask = None if is_causal else build
        total, received = attend_chunk(q, k, v, layer.chunk, ranks, build_mask, options)
        layer.exchange.count(received)
        return total
    if not is_causal:
        partial = attend(q, k, v, mask=own_mask(0), **options)
    elif q.shape[1] == 1:  # the newest token sees all keys
        partial = attend(q, k, v, **options)
    else:
        seen = ranks.held(layer.length - layer.last_update_tokens)
        new_are_queries = mask.rows is None and k.shape[1] - seen == layer.last_update_tokens
        partial = attend_seen_and_new(q, k, v, seen, None if new_are_queries else lambda: own_mask(seen), options)
    return layer.exchange.reduce(partial)


def _local_mask(
    layer: KeyLayer | None, q: Tensor, k: Tensor, mask: LazyMask | Tensor | None, is_causal: bool
) -> Tensor | None:
    """The mask of a layer whose keys are whole on this rank: a window, or a layer without our cache."""
    T, S = q.shape[1], k.shape[1]
    if mask is None:
        mask = lazy_mask(q_offset=S - T) if is_causal and T > 1 else None
    if not isinstance(mask, LazyMask):
        return None if mask is None else _checked(mask, S)
    if layer is None:
        query_slots = torch.arange(mask.first_query, mask.first_query + T, device=q.device)
        first_key = mask.first_key
    else:
        query_slots = layer.query_slots(q.device)
        query_slots = query_slots if layer.chunk is not None else query_slots[mask.rows or slice(None)]
        first_key = layer.length - S
    return mask.build(query_slots, torch.arange(first_key, first_key + S, device=q.device), q.shape[0])


def _as_rule(mask: LazyMask | Tensor, slots: int) -> LazyMask:
    """Turn the caller's mask tensor `[B or 1, 1, T, slots]` into a rule over slots."""
    if isinstance(mask, LazyMask):
        return mask
    allowed = _checked(mask, slots)
    first_query = slots - allowed.shape[2]

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch.clamp(max=allowed.shape[0] - 1)
        return allowed[row, 0, query - first_query, key]

    return LazyMask(rule, None)


def _checked(mask: Tensor, keys: int) -> Tensor:
    """Return a 4-D mask. Raises unless it is bool, the same for all heads, and as wide as the keys."""
    if mask.dtype != torch.bool:
        raise Unsupported(f"a 4-D attention_mask must be bool (True: may attend), got {mask.dtype}: pass mask >= 0")
    if mask.shape[1] != 1:
        raise Unsupported(f"a 4-D attention_mask must be the same for all heads [B, 1, T, S], got {list(mask.shape)}")
    if mask.shape[3] != keys:
        raise InputError(f"a 4-D attention_mask must have a column for each of {keys} keys, got {list(mask.shape)}")
    return mask


def _check_supported(dropout: float, others: dict[str, Any]) -> None:
    if dropout:
        raise Unsupported(f"tree_attention has no dropout, got {dropout}: call model.eval(), or train with 'sdpa'")
    if others.get("cache") is not None:
        raise Unsupported("continuous batching (generate_batch) is not supported: use model.generate")
    # Models that do not pass the argument on to their layers collect what these return.
    if others.get("output_attentions") or _is_collected("attentions"):
        raise Unsupported(
            "output_attentions=True is not supported: the weights are never all on one rank. Leave it out, or load the "
            "model with attn_implementation='eager' in one process"
        )
    if names := [
        name for name in ("position_bias", "indices", "block_indices", "sinks") if others.get(name) is not None
    ]:
        raise Unsupported(
            f"attention with {names[0]!r} is not supported: load this model with another attn_implementation"
        )


def _is_collected(output: str) -> bool:
    """Return True if the caller of the forward pass asked for this output of each layer."""
    if torch.compiler.is_compiling():  # steps ask for logits only
        return False
    return output in (output_capturing._active_collector.get() or ())
