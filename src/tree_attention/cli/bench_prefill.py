"""`tree-attention bench prefill`: a whole model that reads a long text, as a table and as records."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from ..bench.prefill import WAYS, measure
from ..errors import InputError
from .bench import numbers
from .bench_decode import PLAIN_MEMORY
from .bench_steps import publish, surroundings_of, ways_of
from .launch import run_on_ranks
from .models import load_model
from .options import BenchPrefillOptions
from .terminal import reading_bar


def bench_prefill(options: BenchPrefillOptions) -> int:
    """Measure on `nproc` ranks, print a table and one JSON document; returns the exit code."""
    config, nproc, chunk_tokens, rounds = options.config, options.nproc, options.chunk_tokens, options.rounds
    lengths, chosen = sorted(numbers("contexts", options.contexts)), ways_of(config, options.variants, WAYS)
    if min(lengths[0], nproc, chunk_tokens, rounds) < 1:
        raise InputError("contexts, nproc, chunk-tokens and rounds must be at least 1")
    os.environ.update(PLAIN_MEMORY)  # inherited by the ranks
    return run_on_ranks(
        _on_rank, nproc, options.device, str(config), lengths, chosen, chunk_tokens, rounds, options.output
    )


def _on_rank(
    config: str, lengths: list[int], ways: list[str], chunk_tokens: int, rounds: int, output: Path | None,
    device: torch.device,
) -> None:  # fmt: skip
    transformers.logging.set_verbosity_error()
    model = load_model(config, "auto", device, random=True)

    def take(length: int) -> list[dict[str, Any]]:
        with reading_bar(length, shown=dist.get_rank() == 0) as on_progress:
            return measure(model, length, ways, chunk_tokens=chunk_tokens, rounds=rounds, on_progress=on_progress)

    publish(lengths, take, _print, surroundings_of(config, model, device), output)


def _print(records: list[dict[str, Any]]) -> None:
    table = Table(title=f"reading {records[0]['context_tokens']} tokens", title_justify="left")
    for name in ("", "ranks", "first, s", "then, s", "TFLOP/s a rank", "peak, GB", "of it weights", "cache", ""):
        table.add_column(name, justify="right" if name else "left")
    for record in records:
        cells = ["-", "-", "-"]
        if record["seconds"] is not None:
            rate = record["flops"] / record["seconds"] / record["ranks"] / 1e12
            cells = [f"{record['first_s']:.2f}", f"{record['seconds']:.2f}", f"{rate:.0f}"]
        sizes = [f"{record[name] / 1e9:.1f}" for name in ("peak_bytes", "weight_bytes", "kv_bytes")]
        table.add_row(record["what"], str(record["ranks"]), *cells, *sizes, record["note"] or "")
    Console(width=120).print(table)
    sys.stdout.flush()
