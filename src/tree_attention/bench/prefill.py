"""Measures the prefill of a long prompt with a whole model: seconds, FLOP/s, peak memory. The variants:

ours     context-parallel prefill into a static TreeCache over all ranks
stock    transformers' sdpa into a DynamicCache, in one forward pass, on the first rank only
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache

from ..group import gather_objects
from ..hf import TreeCache, prefill

VARIANTS = ("ours", "stock")


@torch.no_grad()
def measure_prefill(
    model: Any, context: int, variants: list[str], *, chunk_tokens: int, rounds: int, on_progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Return one record per variant, the same on every rank: the prefill of `context` random tokens, `rounds` times.

    first_s: the first round, which compiles kernels. seconds: the median of the other rounds, or of the only one. Both
    of the slowest rank. flops: those of the whole prompt (`prefill_flops`). peak_bytes: on the rank with the highest
    peak, including weight_bytes and kv_bytes. If the memory does not suffice, the record has a note and no times.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, context + 1), generator=torch.Generator().manual_seed(0)).to(model.device)
    return [
        {"context_tokens": context, "what": variant} | _measure(model, ids, variant, chunk_tokens, rounds, on_progress)
        for variant in variants
    ]


def prefill_flops(config: Any, weights: int, tokens: int) -> float:
    """FLOPs of the prefill of `tokens` tokens with `weights` weights in the layers.

    2 per weight and token; and in every layer 4 D H per pair of a query and a key that it sees, 2 for the score and 2
    for the value.
    """
    config = config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = tokens * (tokens + 1) / 2
    return 2.0 * weights * tokens + 4.0 * head_dim * config.num_attention_heads * config.num_hidden_layers * pairs


def _measure(
    model: Any, ids: Tensor, variant: str, chunk_tokens: int, rounds: int, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    alone, device = variant == "stock", model.device
    model.set_attn_implementation("sdpa" if alone else "tree_attention")
    taken, kv_bytes, note = [], 0, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        try:
            if not alone:
                kv_bytes = _ours(model, ids, chunk_tokens, on_progress)
            elif dist.get_rank() == 0:
                kv_bytes = _stock(model, ids)
        except torch.OutOfMemoryError as error:
            if not alone:  # the other ranks would wait for this one
                raise
            note = str(error).splitlines()[0][:160]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
        gc.collect()
        if note is not None:
            break
    layer_weights = sum(weight.numel() for name, weight in model.named_parameters() if "layers." in name)
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    mine = {"taken": taken, "kv_bytes": kv_bytes, "note": note, "peak_bytes": peak_bytes}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    by_rank = gather_objects(mine, dist.group.WORLD)
    if alone:
        by_rank = by_rank[:1]
    slowest = [max(times_s) for times_s in zip(*(each["taken"] for each in by_rank), strict=True)]
    note = by_rank[0]["note"]
    return {
        "ranks": len(by_rank),
        "chunk_tokens": None if alone else chunk_tokens,
        "note": note,
        "first_s": None if note else slowest[0],
        "seconds": None if note else statistics.median(slowest[1:] or slowest),
        "flops": prefill_flops(model.config, layer_weights, ids.shape[1] - 1),
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "kv_bytes": max(each["kv_bytes"] for each in by_rank),
        "peak_bytes": max(each["peak_bytes"] for each in by_rank),
    }


def _ours(model: Any, ids: Tensor, chunk_tokens: int, on_progress: Callable[[int], None]) -> int:
    """Prefill and return the bytes of the cache. The prompt has one token more: `prefill` leaves the last one."""
    cache = TreeCache(model.config, max_tokens=ids.shape[1])
    prefill(model, ids, cache, chunk_tokens=chunk_tokens, on_progress=on_progress)
    return cache.kv_bytes


def _stock(model: Any, ids: Tensor) -> int:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
