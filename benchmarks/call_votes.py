"""What a call of all ranks costs beside its work: the vote at its start and the record at its end, in milliseconds.

    python benchmarks/call_votes.py

Two CPU ranks, 4000 tokens, no computation in between; one JSON line with the median, 1st and 9th decile of 200 calls.
"""

import json
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tree_attention.hf import TreeCache
from tree_attention.hf.calls import Call
from tree_attention.testing import RankPool

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS, CALLS = 4000, 200


def votes(group):
    config = AutoConfig.for_model("llama", vocab_size=256, intermediate_size=96, **SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="tree_attention")
    cache, ids, calls_ms = TreeCache(config, group), torch.arange(TOKENS)[None] % 256, []
    for _ in range(CALLS):
        start_s = time.perf_counter()
        with Call("votes", model, cache) as call:
            call.described["input_ids"] = ids
            call.start()
        calls_ms.append(1e3 * (time.perf_counter() - start_s))
    deciles = statistics.quantiles(calls_ms, n=10)
    return {"median_ms": statistics.median(calls_ms), "decile_1_ms": deciles[0], "decile_9_ms": deciles[-1]}


if __name__ == "__main__":
    pool = RankPool(2)
    print(json.dumps(max(pool.run(votes), key=lambda figures: figures["median_ms"])))
    pool.close()
