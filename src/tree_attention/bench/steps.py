"""Measures the decode step of a whole model, as `generate` runs it, on caches filled with random numbers. The variants:

ours eager, captured, compiled    a static TreeCache over all ranks, with that mode of its steps (hf/step.py)
stock eager, compiled             transformers' sdpa on the first rank only: DynamicCache, or StaticCache and compiled
"""

import gc
import statistics
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import Cache, DynamicCache, StaticCache

from ..errors import Unsupported
from ..group import first_fault, gather_objects
from ..hf import TreeCache
from ..hf.tensor_parallel import sequence_axis, tensor_ranks
from .timing import one_line, restart_peak

VARIANTS = ("ours eager", "ours captured", "ours compiled", "stock eager", "stock compiled")
TENSOR_PARALLEL_VARIANTS = VARIANTS[:3]  # ours: for a model whose weights are split over ranks
WARM_UP_TOKENS = 8


@torch.no_grad()
def measure_steps(model: Any, context: int, variants: list[str], *, tokens: int) -> list[dict[str, Any]]:
    """Return one record per variant at a context length, the same on every rank.

    model: with attn_implementation="tree_attention", on this rank's device. A model that is split over ranks supports
    TENSOR_PARALLEL_VARIANTS only. tpot_s: the median over `tokens` tokens, on the slowest rank. bytes: read per token
    and rank: the weights without the embedding, and the rank's keys and values. If the memory does not suffice, the
    record has a note and no figures.

    Raises Unsupported if a layer of the model is not full attention.
    """
    config = model.config.get_text_config(decoder=True)
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"}
    if getattr(config, "kv_lora_rank", None):
        others.add("latent attention")
    if others:
        raise Unsupported(
            f"bench steps fills caches of full attention only, this model has {', '.join(sorted(others))}: "
            "use generate --random-weights, which runs a prefill"
        )
    return [{"context_tokens": context, "what": name} | _measure(model, context, name, tokens) for name in variants]


def _measure(model: Any, context: int, variant: str, tokens: int) -> dict[str, Any]:
    alone, cache, note, mine = variant.startswith("stock"), None, None, None
    model.set_attn_implementation("sdpa" if alone else "tree_attention")
    restart_peak(model.device)
    if not alone or dist.get_rank() == 0:
        try:
            cache = _filled(model, context, variant, context + WARM_UP_TOKENS + tokens)
        except torch.OutOfMemoryError as error:
            note = one_line(error)
    note = first_fault(note, dist.group.WORLD)
    if note is None and cache is not None:
        mine = _decode(model, cache, context, tokens)
    by_rank = [figures for figures in gather_objects(mine, dist.group.WORLD) if figures is not None]
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    names = ("tpot_s", "peak_bytes", "bytes")
    worst = {name: max((figures[name] for figures in by_rank), default=None) for name in names}
    return worst | {"note": note, "ranks": 1 if alone else dist.get_world_size()}


def _filled(model: Any, context: int, variant: str, max_tokens: int) -> Cache:
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads // tensor_ranks(model.config)
    first = torch.zeros((1, heads, 0, head_dim), dtype=model.dtype, device=model.device)
    if variant == "stock eager":
        cache = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            keys, values = (first.new_empty((1, heads, context, head_dim)).normal_() for _ in "kv")
            cache.update(keys, values, index)
        return cache
    if variant == "stock compiled":
        cache = StaticCache(config=config, max_cache_len=max_tokens)
    else:
        step = variant.removeprefix("ours ")
        cache = TreeCache(model.config, sequence_axis(model), max_tokens=max_tokens, step=step)
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.lazy_initialization(first, first)
        if isinstance(cache, StaticCache):
            layer.cumulative_length.fill_(context)
        else:
            layer.grow(1)
            layer.count(context)
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def _decode(model: Any, cache: Any, context: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(model.config.vocab_size, (1, context + 1), generator=torch.Generator().manual_seed(0))
    ids, times_s = ids.to(model.device), []
    clock = SimpleNamespace(put=lambda token: times_s.append(time.perf_counter()), end=lambda: None)
    greedy = {"do_sample": False, "eos_token_id": None} | dict.fromkeys(("temperature", "top_p", "top_k"))
    inputs = {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
    model.generate(ids, **inputs, max_new_tokens=WARM_UP_TOKENS + tokens, streamer=clock, **greedy)
    steps_s = [after - before for before, after in pairwise(times_s)]
    held = cache.ranks.held(context) if hasattr(cache, "ranks") else context  # tokens on this rank
    read = sum(map(_here_bytes, model.parameters())) - _here_bytes(model.get_input_embeddings().weight)
    read += sum(buffer[:, :, :1].nbytes * held for layer in cache.layers for buffer in (layer.keys, layer.values))
    peak_bytes = torch.cuda.max_memory_allocated()  # 0 on the CPU
    return {"tpot_s": statistics.median(steps_s[-tokens:]), "peak_bytes": peak_bytes, "bytes": read}


def _here_bytes(weight: Any) -> int:
    return (weight.to_local() if hasattr(weight, "to_local") else weight).nbytes
