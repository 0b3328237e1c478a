"""Measures generation with a whole model: time to the first token, time per token, bytes of the KV cache.

The contestants take turns in the same processes for several rounds, so that drifts of the machine's speed affect all:

stock            transformers' sdpa attention and DynamicCache, on the first rank only, prefill in one forward pass
tree_attention   ours, on the first rank only, and on all ranks
apart            ours on one rank, run by every rank at the same time: the loss to shared memory and caches
"""

import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from ..hf import TreeCache, prefill

WARM_UP_STEPS = 4


@torch.no_grad()
def measure_generation(
    model: str, ids: Tensor, contexts: list[int], *, decode_tokens: int, chunk_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Return one record per context and contestant. float32, one thread per rank, each rank on its own core.

    ids: `[1, tokens]`, at least the longest context. ttft_s is the median over rounds, tpot_s the median over the steps
    of all rounds, both of the slowest rank.
    """
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {dist.get_rank() % (os.cpu_count() or 1)})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    alone = dist.new_group([0])
    solos = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    apart, together = solos[dist.get_rank()], dist.group.WORLD
    contestants = [("stock", alone), ("tree_attention", alone), ("apart", apart), ("tree_attention", together)]
    records = []
    for context in contexts:
        taken: list[list[dict[str, Any]]] = [[] for _ in contestants]
        for _ in range(rounds):
            for turns, (what, group) in zip(taken, contestants, strict=True):
                dist.barrier()
                if group != dist.GroupMember.NON_GROUP_MEMBER:
                    turns.append(_turn(loaded, ids[:, :context], what, group, decode_tokens, chunk_tokens))
        for turns, (what, group) in zip(taken, contestants, strict=True):
            records.append(_summary(turns, what, group, context))
    return records


def _turn(model: Any, ids: Tensor, what: str, group: Any, decode_tokens: int, chunk_tokens: int) -> dict[str, Any]:
    """Prefill, then decode greedily; times of this rank."""
    model.set_attn_implementation("sdpa" if what == "stock" else "tree_attention")
    cache: Any = DynamicCache(config=model.config) if what == "stock" else TreeCache(model.config, group)
    start = time.perf_counter()
    if isinstance(cache, TreeCache):
        prefill(model, ids, cache, chunk_tokens=chunk_tokens)
    rest = ids[:, cache.get_seq_length() :]
    logits = model(input_ids=rest, past_key_values=cache, logits_to_keep=1).logits
    ttft_s = time.perf_counter() - start
    layers: list[Any] = cache.layers
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    received = getattr(cache, "received_bytes", 0.0)
    steps_s = []
    for _ in range(WARM_UP_STEPS + decode_tokens):
        token = logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        steps_s.append(time.perf_counter() - start)
    received = (getattr(cache, "received_bytes", 0.0) - received) / len(steps_s)
    return {"ttft_s": ttft_s, "steps_s": steps_s[WARM_UP_STEPS:], "kv_bytes": kv_bytes, "received_bytes": received}


def _summary(turns: list[dict[str, Any]], what: str, group: Any, context: int) -> dict[str, Any]:
    """The record: medians of the slowest rank. Ranks that did not take part contribute zeros."""
    mine = [0.0, 0.0, 0.0, 0.0]
    if turns:
        tpot_s = statistics.median(step_s for turn in turns for step_s in turn["steps_s"])
        mine = [statistics.median(turn["ttft_s"] for turn in turns), tpot_s]
        mine += [turns[-1]["kv_bytes"], turns[-1]["received_bytes"]]
    slowest = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    ttft_s, tpot_s, kv_bytes, received_bytes = slowest.tolist()
    ranks = dist.get_world_size() if group is dist.group.WORLD else 1
    sizes = {"kv_bytes_per_rank": int(kv_bytes), "received_bytes_per_token": received_bytes}
    return {"what": what, "ranks": ranks, "context_tokens": context, "ttft_s": ttft_s, "tpot_s": tpot_s} | sizes
