"""What guesses from the text win and cost: SmolLM2-135M on the CPU, 4000 tokens of the language reference, one process.

    python benchmarks/lookup.py

One JSON line for each question, with and without guesses, asked in turn: the median ms per token, tokens per step, and
whether both wrote the same text. A question that quotes the text; and one for sampling, of which no guess is right.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tree_attention.hf import Session

ROUNDS, TOKENS, READ = 5, 96, 4000
QUESTIONS = {
    "quote": ('Quote the paragraph that begins with "The extended form".', {"do_sample": False}),
    "poem": ("Write a poem about the sea.", {"do_sample": True, "temperature": 1.3, "top_k": 0}),
}


def main() -> None:
    script = Path(__file__).parents[1] / "scripts" / "smollm2.py"
    folder = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="tree_attention"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    read = Session.open(model, tokenizer)
    text = "\n\n".join(topics[key] for key in sorted(topics))
    read.read(torch.tensor(tokenizer(text).input_ids[:READ]))
    for name, (question, how) in QUESTIONS.items():
        taken: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
        for seed in range(ROUNDS):
            for lookup in (True, False):
                session, times_s = read.fork(), []
                torch.manual_seed(seed)
                answer = session.ask(
                    question, lookup=lookup, max_new_tokens=TOKENS, eos_token_id=None, **how,
                    on_token=lambda _, times_s=times_s: times_s.append(time.perf_counter()),
                )  # fmt: skip
                written = "".join(answer)
                ms = 1e3 * (times_s[-1] - times_s[0]) / (TOKENS - 1)
                taken[lookup].append((ms, TOKENS / session.steps, written))
        for lookup, turns in taken.items():
            ms, per_step = (statistics.median(turn[i] for turn in turns) for i in range(2))
            same = [turn[2] for turn in taken[True]] == [turn[2] for turn in taken[False]]
            print(json.dumps({"question": name, "lookup": lookup, "ms": ms, "per_step": per_step, "same": same}))


if __name__ == "__main__":
    main()
