"""Reading a long text with a whole model: seconds, operations a second, and the peak of memory.

ours     context-parallel prefill into a static TreeCache over all ranks
stock    transformers' sdpa into a DynamicCache, in one piece, on the first rank alone
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

WAYS = ("ours", "stock")


@torch.no_grad()
def measure(
    model: Any, context: int, ways: list[str], *, chunk_tokens: int, rounds: int, on_progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """A record for each way, the same on every rank, of reading `context` random tokens `rounds` times.

    first_s, seconds: the first time, in which kernels are compiled and plans made, and the median of the others (of the
    one, if there is one); of the slowest rank. flops: those of the whole text (`read_flops`). peak_bytes: of the rank
    with most, of which weight_bytes and kv_bytes are weights and cache. A way that has not enough memory has a note.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, context + 1), generator=torch.Generator().manual_seed(0)).to(model.device)
    return [
        {"context_tokens": context, "what": way} | _measure(model, ids, way, chunk_tokens, rounds, on_progress)
        for way in ways
    ]


def read_flops(config: Any, weights: int, tokens: int) -> float:
    """Operations to read `tokens` tokens with `weights` weights in the layers.

    2 a weight and token, and in every layer 4 D H for each query and key that it sees: scores and values, 2 each.
    """
    config = config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = tokens * (tokens + 1) / 2
    return 2.0 * weights * tokens + 4.0 * head_dim * config.num_attention_heads * config.num_hidden_layers * pairs


def _measure(
    model: Any, ids: Tensor, way: str, chunk_tokens: int, rounds: int, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    alone, device = way == "stock", model.device
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
            if not alone:  # the other ranks wait for this one
                raise
            note = str(error).splitlines()[0][:160]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
        gc.collect()
        if note is not None:
            break
    body = sum(weight.numel() for name, weight in model.named_parameters() if "layers." in name)
    mine = {
        "taken": taken, "kv_bytes": kv_bytes, "note": note,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()
    of_ranks = gather_objects(mine, dist.group.WORLD)
    if alone:
        of_ranks = of_ranks[:1]
    slowest = [max(its) for its in zip(*(of_rank["taken"] for of_rank in of_ranks), strict=True)]
    note = of_ranks[0]["note"]
    return {
        "ranks": len(of_ranks), "chunk_tokens": None if alone else chunk_tokens, "note": note,
        "first_s": None if note else slowest[0],
        "seconds": None if note else statistics.median(slowest[1:] or slowest),
        "flops": read_flops(model.config, body, ids.shape[1] - 1),
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "kv_bytes": max(of_rank["kv_bytes"] for of_rank in of_ranks),
        "peak_bytes": max(of_rank["peak_bytes"] for of_rank in of_ranks),
    }  # fmt: skip


def _ours(model: Any, ids: Tensor, chunk_tokens: int, on_progress: Callable[[int], None]) -> int:
    """One token more than counts: the last stay for `generate`."""
    cache = TreeCache(model.config, max_tokens=ids.shape[1])
    prefill(model, ids, cache, chunk_tokens=chunk_tokens, on_progress=on_progress)
    return cache.kv_bytes


def _stock(model: Any, ids: Tensor) -> int:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
