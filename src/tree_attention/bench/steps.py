"""The decode step of a whole model, as `generate` runs it: seconds a token over the context, and the peak of memory.

Caches are filled with random numbers instead of being read into, which would take hours. The contestants:

ours eager, captured, compiled    a static TreeCache over all ranks, its steps run in that way (hf/step.py)
stock eager, compiled             transformers' sdpa on the first rank alone: DynamicCache, or StaticCache and compiled
"""

import gc
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from ..errors import Unsupported
from ..group import first_fault, gather_objects
from ..hf import TreeCache
from ..hf.tensor_parallel import sequence_axis, tensor_ranks

WAYS = ("ours eager", "ours captured", "ours compiled", "stock eager", "stock compiled")
SPLIT_WAYS = WAYS[:3]  # of a model that is split over ranks: ours
WARM_UP_TOKENS = 8


@torch.no_grad()
def measure(model: Any, contexts: list[int], ways: list[str], *, tokens: int) -> list[dict[str, Any]]:
    """A record for each context and way, the same on every rank.

    model: with attn_implementation="tree_attention", on this rank's device; if it is split over ranks, SPLIT_WAYS only.
    tpot_s: the median of `tokens` tokens, on the slowest rank. bytes: what a token has to read on a rank, the weights
    but the embedding, and the rank's keys and values. A way for which there is not enough memory has a note and no
    figures.

    Raises Unsupported for a model whose caches are more than keys and values of full attention.
    """
    _check(model)
    records = []
    for context in contexts:
        for way in ways:
            taken = _measure(model, context, way, tokens)
            records.append({"context_tokens": context, "what": way, **taken})
    return records


def _check(model: Any) -> None:
    config = model.config.get_text_config(decoder=True)
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"}
    if getattr(config, "kv_lora_rank", None):
        others.add("latent attention")
    if others:
        raise Unsupported(
            f"bench steps fills caches of full attention only, this model has {', '.join(sorted(others))}: "
            "use generate --random-weights, which reads a text first"
        )


def _measure(model: Any, context: int, way: str, tokens: int) -> dict[str, Any]:
    rank, device, alone = dist.get_rank(), model.device, way.startswith("stock")
    model.set_attn_implementation("sdpa" if alone else "tree_attention")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache, note, mine = None, None, None
    if not alone or rank == 0:
        try:
            cache = _filled(model, context, way, context + WARM_UP_TOKENS + tokens)
        except torch.OutOfMemoryError as error:
            note = str(error).splitlines()[0][:160]
    note = first_fault(note, dist.group.WORLD)
    if note is None and cache is not None:
        mine = _run(model, cache, context, tokens)
    of_ranks = [its for its in gather_objects(mine, dist.group.WORLD) if its is not None]
    del cache
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    names = ("tpot_s", "peak_bytes", "bytes")
    worst = {name: max((its[name] for its in of_ranks), default=None) for name in names}
    ranks = 1 if alone else dist.get_world_size()
    return worst | {"note": note, "ranks": ranks}


def _run(model: Any, cache: Any, context: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(model.config.vocab_size, (1, context + 1), generator=torch.Generator().manual_seed(0))
    ids, clock = ids.to(model.device), _Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=WARM_UP_TOKENS + tokens,
        do_sample=False, eos_token_id=None, streamer=clock, **dict.fromkeys(("temperature", "top_p", "top_k")),
    )  # fmt: skip
    steps = [after - before for before, after in pairwise(clock.times_s)]
    read = sum(map(_here_bytes, model.parameters())) - _here_bytes(model.get_input_embeddings().weight)
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else 0
    read += _held_bytes(cache, context)
    return {"tpot_s": statistics.median(steps[-tokens:]), "peak_bytes": peak, "bytes": read}


def _filled(model: Any, context: int, way: str, room: int) -> Any:
    """A cache that says it has read `context` tokens."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads // tensor_ranks(model.config)
    first = torch.zeros((1, heads, 0, head_dim), dtype=model.dtype, device=model.device)
    cache: Any
    if way == "stock eager":
        cache = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            cache.update(*(_noise(first, context) for _ in range(2)), index)
    elif way == "stock compiled":
        cache = StaticCache(config=config, max_cache_len=room)
        for layer in cache.layers:
            layer.lazy_initialization(first, first)
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
    else:
        cache = TreeCache(model.config, sequence_axis(model), max_tokens=room, step=way.removeprefix("ours "))
        for layer in cache.layers:
            layer.lazy_initialization(first, first)
            layer.grow(1)
            layer.keys.normal_()
            layer.values.normal_()
            layer.count(context)
    return cache


def _noise(like: Tensor, tokens: int) -> Tensor:
    return like.new_empty((*like.shape[:2], tokens, like.shape[3])).normal_()


def _here_bytes(weight: Any) -> int:
    """Of a weight, or of this rank's part of it."""
    return (weight.to_local() if hasattr(weight, "to_local") else weight).nbytes


def _held_bytes(cache: Any, context: int) -> int:
    """Of the keys and values of `context` tokens on this rank."""
    held = cache.ranks.held(context) if hasattr(cache, "ranks") else context
    return sum(buffer[:, :, :1].nbytes * held for layer in cache.layers for buffer in (layer.keys, layer.values))


class _Clock(BaseStreamer):
    """When each token was there for its reader."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass
