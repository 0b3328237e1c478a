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
from .timing import one_line, restart_peak

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
    vocabulary, how = model.config.get_text_config(decoder=True).vocab_size, (chunk_tokens, rounds, on_progress)
    ids = torch.randint(vocabulary, (1, context + 1), generator=torch.Generator().manual_seed(0)).to(model.device)
    return [{"context_tokens": context, "what": name} | _measure(model, ids, name, *how) for name in variants]


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
    alone, taken_s, kv_bytes, note = variant == "stock", [], 0, None
    model.set_attn_implementation("sdpa" if alone else "tree_attention")
    restart_peak(model.device)
    while len(taken_s) < rounds and note is None:
        dist.barrier()
        start = time.perf_counter()
        try:
            if not alone or dist.get_rank() == 0:
                kv_bytes = _kv_bytes(model, ids, alone, chunk_tokens, on_progress)
        except torch.OutOfMemoryError as error:
            if not alone:  # the other ranks would wait for this one
                raise
            note = one_line(error)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        taken_s.append(time.perf_counter() - start)
        gc.collect()
    layer_weights = sum(weight.numel() for name, weight in model.named_parameters() if "layers." in name)
    mine = (taken_s, note, kv_bytes, torch.cuda.max_memory_allocated())  # a peak of 0 on the CPU
    torch.cuda.empty_cache()
    by_rank = gather_objects(mine, dist.group.WORLD)[: 1 if alone else None]
    times_s, notes, kv_bytes, peak_bytes = zip(*by_rank, strict=True)
    slowest_s = list(map(max, zip(*times_s, strict=True)))
    first_s, seconds = slowest_s[0], statistics.median(slowest_s[1:] or slowest_s)
    times = {"first_s": None, "seconds": None} if notes[0] else {"first_s": first_s, "seconds": seconds}
    flops = prefill_flops(model.config, layer_weights, ids.shape[1] - 1)
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    sizes = {"weight_bytes": weight_bytes, "kv_bytes": max(kv_bytes), "peak_bytes": max(peak_bytes)}
    about = {"ranks": len(by_rank), "chunk_tokens": None if alone else chunk_tokens, "note": notes[0]}
    return about | times | {"flops": flops} | sizes


def _kv_bytes(model: Any, ids: Tensor, alone: bool, chunk_tokens: int, on_progress: Callable[[int], None]) -> int:
    """Prefill all tokens but the last one and return the bytes of the cache, which is then freed."""
    if alone:
        stock: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        model.base_model(input_ids=ids[:, :-1], past_key_values=stock, use_cache=True)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)
    cache = TreeCache(model.config, max_tokens=ids.shape[1])
    prefill(model, ids, cache, chunk_tokens=chunk_tokens, on_progress=on_progress)
    return cache.kv_bytes
