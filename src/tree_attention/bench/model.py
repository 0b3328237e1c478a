"""Measures a whole model: generation on CPUs; and with random numbers its decode step and the prefill of a long prompt.

ours     over all ranks: the steps of a static TreeCache, eager, captured or compiled (hf/step.py), and its prefill
stock    transformers' sdpa on the first rank only: DynamicCache, or StaticCache and compiled; prefill in one pass
"""

import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, StaticCache

from ..errors import Unsupported
from ..group import first_fault, gather_values
from ..hf import TreeCache, prefill
from ..hf.decode_loop import DecodeLoop
from ..hf.inputs import CACHE
from ..hf.lookup import Lookup
from ..hf.tensor_parallel import sequence_axis, tensor_ranks
from .timing import one_line, restart_peak

STEP_VARIANTS = ("ours eager", "ours captured", "ours compiled", "stock eager", "stock compiled")
TENSOR_PARALLEL_VARIANTS = STEP_VARIANTS[:3]  # ours: for a model whose weights are split over ranks
PREFILL_VARIANTS = ("ours", "stock")
WARM_UP_STEPS, WARM_UP_TOKENS = 4, 8  # of measure_generation, of measure_steps


@torch.no_grad()
def measure_generation(
    model: str, ids: Tensor, contexts: list[int], *, decode_tokens: int, chunk_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Return one record per context and contestant. float32, one thread per rank, each rank on its own core.

    The contestants take turns for several rounds, so that drifts of the machine's speed affect all: "stock" (prefill in
    one forward pass), "tree_attention" on the first rank only and on all ranks, and "apart": ours on one rank, run by
    every rank at the same time, which shows the loss to shared memory and caches.

    ids: `[1, tokens]`, at least the longest context. ttft_s is the median over rounds, tpot_s the median over the steps
    of all rounds, both of the slowest rank.
    """
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {dist.get_rank() % (os.cpu_count() or 1)})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    alone, together = dist.new_group([0]), dist.group.WORLD
    apart = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    contestants = [("stock", alone), ("tree_attention", alone), ("apart", apart), ("tree_attention", together)]
    records = []
    for context in contexts:
        taken: list[list[dict[str, Any]]] = [[] for _ in contestants]
        for _ in range(rounds):
            for turns, (what, group) in zip(taken, contestants, strict=True):
                dist.barrier()
                if group != dist.GroupMember.NON_GROUP_MEMBER:
                    turns.append(_generate(loaded, ids[:, :context], what, group, decode_tokens, chunk_tokens))
        for turns, (what, group) in zip(taken, contestants, strict=True):
            records.append(_slowest(turns, what, group, context))
    return records


def _generate(model: Any, ids: Tensor, what: str, group: Any, decode_tokens: int, chunk_tokens: int) -> dict[str, Any]:
    model.set_attn_implementation("sdpa" if what == "stock" else "tree_attention")
    cache: Any = DynamicCache(config=model.config) if what == "stock" else TreeCache(model.config, group)
    start = time.perf_counter()
    if isinstance(cache, TreeCache):
        prefill(model, ids, cache, chunk_tokens=chunk_tokens)
    rest = ids[:, cache.get_seq_length() :]
    logits = model(input_ids=rest, **{CACHE: cache}, logits_to_keep=1).logits
    ttft_s = time.perf_counter() - start
    layers: list[Any] = cache.layers
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    received = getattr(cache, "received_bytes", 0.0)
    steps_s = []
    for _ in range(WARM_UP_STEPS + decode_tokens):
        token = logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        logits = model(input_ids=token, **{CACHE: cache}, logits_to_keep=1).logits
        steps_s.append(time.perf_counter() - start)
    received = (getattr(cache, "received_bytes", 0.0) - received) / len(steps_s)
    return {"ttft_s": ttft_s, "steps_s": steps_s[WARM_UP_STEPS:], "kv_bytes": kv_bytes, "received_bytes": received}


def _slowest(turns: list[dict[str, Any]], what: str, group: Any, context: int) -> dict[str, Any]:
    """The record: medians of the slowest rank. Ranks that did not take part contribute zeros."""
    slowest = torch.zeros(4, dtype=torch.float64)
    if turns:
        ttft_s, last = statistics.median(turn["ttft_s"] for turn in turns), turns[-1]
        tpot_s = statistics.median(step_s for turn in turns for step_s in turn["steps_s"])
        slowest = torch.tensor([ttft_s, tpot_s, last["kv_bytes"], last["received_bytes"]], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    ttft_s, tpot_s, kv_bytes, received_bytes = slowest.tolist()
    ranks = dist.get_world_size() if group is dist.group.WORLD else 1
    sizes = {"kv_bytes_per_rank": int(kv_bytes), "received_bytes_per_token": received_bytes}
    return {"what": what, "ranks": ranks, "context_tokens": context, "ttft_s": ttft_s, "tpot_s": tpot_s} | sizes


@torch.no_grad()
def measure_steps(
    model: Any, context: int, variants: list[str], *, tokens: int, step_tokens: Sequence[int] = (1,)
) -> list[dict[str, Any]]:
    """Return one record per variant and size of a step at a context length, the same on every rank.

    model: with attn_implementation="tree_attention", on this rank's device. A model that is split over ranks supports
    TENSOR_PARALLEL_VARIANTS only. step_tokens: tokens per step of ours, of which all but one are wrong guesses. tpot_s:
    the median over `tokens` steps, on the slowest rank. bytes: read per step and rank: the weights without the
    embedding, and the rank's keys and values. If the memory does not suffice, the record has a note and no figures.

    Raises Unsupported if a layer of the model is not full attention.
    """
    config = model.config.get_text_config(decoder=True)
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"}
    if getattr(config, "kv_lora_rank", None):
        others.add("latent attention")
    if others:
        listed, instead = ", ".join(sorted(others)), "use generate --random-weights, which runs a prefill"
        raise Unsupported(f"bench steps fills caches of full attention only, this model has {listed}: {instead}")
    records = []
    for name, size in itertools.product(variants, step_tokens):
        if size == 1 or not name.startswith("stock"):
            record = {"context_tokens": context, "what": name, "step_tokens": size}
            records.append(record | _time_steps(model, context, name, tokens, size))
    return records


def _time_steps(model: Any, context: int, variant: str, tokens: int, size: int) -> dict[str, Any]:
    alone, cache, note, mine = variant.startswith("stock"), None, None, None
    model.set_attn_implementation("sdpa" if alone else "tree_attention")
    restart_peak(model.device)
    if not alone or dist.get_rank() == 0:
        try:
            cache = _filled(model, context, variant, context + WARM_UP_TOKENS + tokens + size)
        except torch.OutOfMemoryError as error:
            note = one_line(error)
    note = first_fault(note, dist.group.WORLD)
    if note is None and cache is not None:
        mine = _decode(model, cache, context, tokens, size)
    by_rank = [figures for figures in gather_values(mine, dist.group.WORLD) if figures is not None]
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


class _WrongGuesses(Lookup):
    """Guesses the same number of tokens at every step, none of them right."""

    def __init__(self, size: int, ids: Tensor) -> None:
        super().__init__(ids[:0])
        self.size = size

    def guess(self, room: int) -> list[int]:
        return [] if room < self.size - 1 else [0] * (self.size - 1)


def _decode(model: Any, cache: Any, context: int, tokens: int, size: int) -> dict[str, Any]:
    ids = torch.randint(model.config.vocab_size, (1, context + 1), generator=torch.Generator().manual_seed(0))
    ids, times_s = ids.to(model.device), []
    clock: Any = SimpleNamespace(put=lambda token: times_s.append(time.perf_counter()), end=lambda: None)
    greedy = {"do_sample": False, "eos_token_id": None} | dict.fromkeys(("temperature", "top_p", "top_k"))
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids), CACHE: cache, "streamer": clock} | greedy
    if isinstance(cache, TreeCache):  # as `Session.ask` does
        guesses = functools.partial(_WrongGuesses, size) if size > 1 else None
        how |= {"streamer": None, "custom_generate": DecodeLoop(clock, guesses)}
    model.generate(ids, **how, max_new_tokens=WARM_UP_TOKENS + tokens + size - 1)
    times_s = times_s[1:]  # the prompt comes first
    steps_s = [after - before for before, after in pairwise(times_s)][WARM_UP_TOKENS - 1 :][:tokens]
    held = cache.ranks.held(context) if hasattr(cache, "ranks") else context  # tokens on this rank
    read = sum(map(_here_bytes, model.parameters())) - _here_bytes(model.get_input_embeddings().weight)
    read += sum(buffer[:, :, :1].nbytes * held for layer in cache.layers for buffer in (layer.keys, layer.values))
    peak_bytes = torch.cuda.max_memory_allocated()  # 0 on the CPU
    return {"tpot_s": statistics.median(steps_s), "peak_bytes": peak_bytes, "bytes": read}


def _here_bytes(weight: Any) -> int:
    return (weight.to_local() if hasattr(weight, "to_local") else weight).nbytes


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
    return [{"context_tokens": context, "what": name} | _time_prefill(model, ids, name, *how) for name in variants]


def prefill_flops(config: Any, weights: int, tokens: int) -> float:
    """FLOPs of the prefill of `tokens` tokens with `weights` weights in the layers.

    2 per weight and token; and in every layer 4 D H per pair of a query and a key that it sees, 2 for the score and 2
    for the value.
    """
    config = config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = tokens * (tokens + 1) / 2
    return 2.0 * weights * tokens + 4.0 * head_dim * config.num_attention_heads * config.num_hidden_layers * pairs


def _time_prefill(
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
    by_rank = gather_values(mine, dist.group.WORLD)[: 1 if alone else None]
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
        model.base_model(input_ids=ids[:, :-1], **{CACHE: stock}, use_cache=True)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)
    cache = TreeCache(model.config, max_tokens=ids.shape[1])
    prefill(model, ids, cache, chunk_tokens=chunk_tokens, on_progress=on_progress)
    return cache.kv_bytes
