"""`tree-attention bench generate`: compares ranks with one process."""

import platform
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError
from . import environment
from .launch import run_on_ranks
from .options import BenchGenerateOptions, check_model_folder, parse_numbers
from .plots import draw_records
from .records import print_table, publish

CHUNK_TOKENS = 1024


def bench_generate(options: BenchGenerateOptions) -> int:
    """Measure on the ranks, print a table and one JSON document. Returns the exit code."""
    check_model_folder(options.model)
    contexts = sorted(parse_numbers("contexts", options.contexts))
    if min(contexts[0], options.decode_tokens, options.rounds) < 1 or options.nproc < 2:
        raise InputError("contexts, decode-tokens and rounds must be at least 1, nproc at least 2")
    return run_on_ranks(_on_rank, options.nproc, "cpu", options, contexts, preload="tree_attention.bench.model")


def _on_rank(options: BenchGenerateOptions, contexts: list[int], device: torch.device) -> None:
    from transformers import AutoTokenizer  # takes seconds to load; only the ranks need it

    from ..bench.model import measure_generation

    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model, model_max_length=10**9)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : contexts[-1]]
    if ids.shape[1] < contexts[-1]:
        raise InputError(f"contexts must be at most the {ids.shape[1]} tokens of the text, got {contexts[-1]}")
    about = {"date": environment.date(), "model": Path(options.model).name, "cpu": environment.cpu_name()}
    about |= {"python": platform.python_version()} | environment.package_versions("torch", "transformers")
    how = {"decode_tokens": options.decode_tokens, "chunk_tokens": CHUNK_TOKENS, "rounds": options.rounds}
    batches = [measure_generation(options.model, ids, contexts, **how)]
    records = publish(batches, lambda batch: _show(batch, options.nproc), about, options.output)
    if options.plot is not None and dist.get_rank() == 0:
        rates = [record | {"tokens_per_s": 1 / record["tpot_s"]} for record in records]
        title, x = f"{about['model']}, CPU, float32, one core per rank", ("context_tokens", "tokens of context")
        draw_records(options.plot, rates, "tokens_per_s", 1, title=title, x=x, y="tokens per second")


def _show(records: list[dict[str, Any]], nproc: int) -> None:
    """A row per context and contestant. The ratios are to the faster of the two one-process runs."""
    rows = []
    for context in sorted({record["context_tokens"] for record in records}):
        of_context = [record for record in records if record["context_tokens"] == context]
        one = [record for record in of_context if record["ranks"] == 1 and record["what"] != "apart"]
        ttft_s, tpot_s = (min(record[key] for record in one) for key in ("ttft_s", "tpot_s"))
        for record in of_context:
            ours = f"ours, {record['ranks']} rank(s)"
            name = {"stock": "transformers, sdpa", "apart": f"{nproc} x ours, separate"}.get(record["what"], ours)
            kv_mb = record["kv_bytes_per_rank"] / 1e6
            cells = [f"{record['ttft_s']:.2f}", f"{1e3 * record['tpot_s']:.1f}", f"{kv_mb:.1f}"]
            if record["ranks"] == nproc:
                kv = record["kv_bytes_per_rank"] / one[0]["kv_bytes_per_rank"]
                decode = record["tpot_s"] / tpot_s
                cells += [f"{ttft_s / record['ttft_s']:.2f} x faster", f"{decode:.2f} x", f"{kv:.3f} x"]
            rows.append([str(context), name, *cells])
    columns = ("context", "", "first token, s", "ms per token", "KV per rank, MB", "ratio: prefill", "decode", "KV")
    print_table(columns, rows, "CPU, float32, each process on one core")
