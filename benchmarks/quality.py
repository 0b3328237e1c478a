"""Checks the quality of a model whose cache is sharded: perplexity and a copy test, on the CPU in float32.

    python benchmarks/quality.py [--ranks 1,2,3] [--tokens 8192] [--text FILE] [--output FILE]

Prints one JSON line per number of ranks. copy: 64 tokens of the text, a passage of 256 tokens, `distance` further
tokens, and the passage again; the mean loss over the passage the first time, and over its last 240 tokens the second
time.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tree_attention.cli.launch import run_on_ranks
from tree_attention.hf import TreeCache
from tree_attention.hf.inputs import CACHE

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from smollm2 import fetch, long_text

CHUNK = 1024
PASSAGE, LEAD, COMPARED = 256, 64, 240
DISTANCES = (1000, 4000)


@torch.no_grad()
def losses(model, ids, group=None):
    """Return the loss in nats of each token after the first, `[tokens - 1]`, with the cache sharded over the group."""
    cache, parts = TreeCache(model.config, group), []
    for start in range(0, ids.shape[1] - 1, CHUNK):
        stop = min(start + CHUNK, ids.shape[1] - 1)
        logits = model(input_ids=ids[:, start:stop], **{CACHE: cache}).logits[0]
        parts.append(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(parts)


def copy_losses(model, ids, distance, group=None):
    """Return the mean loss over a passage at its first occurrence and at its repetition `distance` tokens later."""
    middle = ids.shape[1] // 2
    passage = ids[:, middle : middle + PASSAGE]
    text = torch.cat([ids[:, :LEAD], passage, ids[:, LEAD : LEAD + distance], passage], 1)
    loss = losses(model, text, group)
    first = loss[LEAD - 1 : LEAD - 1 + PASSAGE].mean()
    return float(first), float(loss[-COMPARED:].mean())


def load(folder):
    transformers.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="tree_attention"
    ).eval()


def on_rank(folder, text, tokens, result, device):
    model = load(folder)
    ids = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)(text, return_tensors="pt").input_ids
    loss = losses(model, ids[:, : tokens + 1])
    record = {
        "model": Path(folder).name, "torch": torch.__version__, "transformers": transformers.__version__,
        "ranks": dist.get_world_size(), "tokens": tokens, "perplexity": math.exp(loss.mean()),
        "perplexity_by_1024": [round(math.exp(part.mean()), 3) for part in loss.split(1024)],
        "copy": {distance: copy_losses(model, ids, distance) for distance in DISTANCES},
    }  # fmt: skip
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(record))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,3")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = str(fetch())
    text = options.text.read_text(encoding="utf-8") if options.text else long_text()
    for ranks in map(int, options.ranks.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            result = f"{scratch}/record.json"
            run_on_ranks(on_rank, ranks, "cpu", folder, text, options.tokens, result)
            line = Path(result).read_text()
        print(line, flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
