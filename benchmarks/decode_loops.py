"""The time per token of transformers' decode loop and of ours, one step at a time and ahead, on one device.

    python benchmarks/decode_loops.py [CONFIG]

CONFIG: a model's config.json, by default that of Llama-3.1-8B; the weights are drawn at random. A static cache, 1025
tokens of prompt, greedy, each loop twice in turn, then both with sampling. One line each: the median of the last 79
tokens in ms, and the last tokens that were written. On GPUs, last, the captured step alone.
"""

import statistics
import sys
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tree_attention.hf import TreeCache
from tree_attention.hf.decode_loop import DecodeLoop
from tree_attention.hf.inputs import CACHE

PROMPT, NEW, WARM_UP, REPLAYS = 1025, 100, 20, 50
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
CONFIG = "src/tree_attention/cost/models/llama-3.1-8b.json"


def run(model: Any, ids: torch.Tensor, loop: str, how: dict[str, Any]) -> TreeCache:
    torch.manual_seed(0)
    cache, times_s = TreeCache(model.config, max_tokens=PROMPT + NEW), []
    clock = SimpleNamespace(put=lambda _: times_s.append(time.perf_counter()), end=lambda: None)
    ours = {"custom_generate": DecodeLoop(clock, None, runs_ahead=loop == "ours ahead")}
    how = how | ({"streamer": clock} if loop == "transformers" else ours)
    mask, limits = torch.ones_like(ids), {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **limits, **how)
    steps_s = [after - before for before, after in pairwise(times_s[1:])][WARM_UP:]
    name = f"{loop}, {'sampling' if how['do_sample'] else 'greedy'}"
    print(f"{name}: {1e3 * statistics.median(steps_s):.3f} ms", written[0, -3:].tolist(), flush=True)
    return cache


@torch.no_grad()
def main() -> None:
    config = AutoConfig.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else CONFIG)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32, attn_implementation="tree_attention"
        ).eval()
        ids = torch.randint(config.vocab_size, (1, PROMPT))
    for loop in ("transformers", "ours", "ours ahead") * 2:
        run(model, ids, loop, {"do_sample": False})
    for loop in ("ours ahead", "transformers"):
        cache = run(model, ids, loop, SAMPLING)
    step = next(iter(cache.captured_steps.values()))
    if step.graph is not None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            step.graph.replay()
        end.record()
        torch.cuda.synchronize()
        print(f"the captured step alone: {begin.elapsed_time(end) / REPLAYS:.3f} ms")


if __name__ == "__main__":
    main()
