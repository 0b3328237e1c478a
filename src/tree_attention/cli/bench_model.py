"""`tree-attention bench steps` and `bench prefill`: a whole model on GPUs, its decode step and its prefill."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..bench.model import PREFILL_VARIANTS, STEP_VARIANTS, TENSOR_PARALLEL_VARIANTS, measure_prefill, measure_steps
from ..errors import InputError
from ..hf.cursor import MAX_STEP_TOKENS
from . import environment
from .launch import run_on_ranks
from .models import load_model
from .options import BenchModelOptions, BenchPrefillOptions, BenchStepsOptions, parse_numbers
from .plots import draw_records
from .records import Record, print_table, publish
from .terminal import reading_bar


def bench_steps(options: BenchStepsOptions) -> int:
    """Measure the decode step over contexts, print tables and one JSON document. Returns the exit code."""
    contexts = sorted(parse_numbers("contexts", options.contexts))
    if options.tensor_parallel == 1:
        variants = _variants(options, STEP_VARIANTS)
    else:
        variants = _variants(options, TENSOR_PARALLEL_VARIANTS, " with tensor-parallel")
    if min(contexts[0], options.nproc, options.tokens) < 1:
        got = f"{options.contexts}, {options.nproc} and {options.tokens}"
        raise InputError(f"contexts, nproc and tokens must be at least 1, got {got}")
    if not all(1 <= size <= MAX_STEP_TOKENS for size in parse_numbers("step-sizes", options.step_sizes)):
        raise InputError(f"step-sizes must be 1 to {MAX_STEP_TOKENS}, got {options.step_sizes}")
    environment.disable_multicast()
    return run_on_ranks(_on_rank, options.nproc, options.device, options, contexts, variants)


def bench_prefill(options: BenchPrefillOptions) -> int:
    """Measure the prefill of prompts, print tables and one JSON document. Returns the exit code."""
    contexts, variants = sorted(parse_numbers("contexts", options.contexts)), _variants(options, PREFILL_VARIANTS)
    if min(contexts[0], options.nproc, options.chunk_tokens, options.rounds) < 1:
        raise InputError("contexts, nproc, chunk-tokens and rounds must be at least 1")
    environment.disable_multicast()
    return run_on_ranks(_on_rank, options.nproc, options.device, options, contexts, variants)


def _variants(options: BenchModelOptions, known: Sequence[str], where: str = "") -> list[str]:
    if not options.config.is_file():
        raise InputError(f"config must be a model's config.json, got {options.config}")
    chosen = list(known) if options.variants == "all" else options.variants.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"variants must be all or some of {', '.join(known)}{where}, got {', '.join(unknown)!r}")
    return chosen


def _on_rank(options: BenchModelOptions, contexts: list[int], variants: list[str], device: torch.device) -> None:
    split = {"tensor_parallel": options.tensor_parallel} if isinstance(options, BenchStepsOptions) else {}
    model = load_model(str(options.config), "auto", device, random=True, **split)
    about: Record = {"date": environment.date(), "model": options.config.stem}
    about |= {"dtype": str(model.dtype).removeprefix("torch.")}
    about |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    about |= environment.package_versions("torch", "transformers")
    about |= {"tokens": options.tokens, **split} if isinstance(options, BenchStepsOptions) else {}
    batches = (_measure(options, model, context, variants) for context in contexts)
    records = publish(batches, _show_steps if split else _show_prefill, about, options.output)
    if options.plot is not None and dist.get_rank() == 0:
        title, x = f"{about['model']}, {about['dtype']}, {about['device']}", ("context_tokens", "tokens of context")
        value, scale, y = ("tpot_s", 1e3, "ms per token") if split else ("seconds", 1, "seconds to read")
        draw_records(options.plot, records, value, scale, title=title, x=x, y=y)


def _measure(options: BenchModelOptions, model: Any, context: int, variants: list[str]) -> list[Record]:
    if isinstance(options, BenchStepsOptions):
        sizes = parse_numbers("step-sizes", options.step_sizes)
        return measure_steps(model, context, variants, tokens=options.tokens, step_tokens=sizes)
    assert isinstance(options, BenchPrefillOptions)
    how = {"chunk_tokens": options.chunk_tokens, "rounds": options.rounds}
    with reading_bar(context, shown=dist.get_rank() == 0) as on_progress:
        return measure_prefill(model, context, variants, **how, on_progress=on_progress)


def _show_steps(records: list[Record]) -> None:
    rows = []
    for record in records:
        cells = ["-", "-", "-"]
        if record["tpot_s"] is not None:
            rate = record["bytes"] / record["tpot_s"] / 1e12
            cells = [f"{1e3 * record['tpot_s']:.2f}", f"{rate:.2f}", f"{record['peak_bytes'] / 1e9:.1f}"]
        rows.append([record["what"], str(record["ranks"]), str(record["step_tokens"]), *cells, record["note"] or ""])
    columns = ("", "ranks", "tokens", "ms per step", "TB/s per rank", "peak, GB", "")
    print_table(columns, rows, f"context of {records[0]['context_tokens']} tokens")


def _show_prefill(records: list[Record]) -> None:
    rows = []
    for record in records:
        cells = ["-", "-", "-"]
        if record["seconds"] is not None:
            rate = record["flops"] / record["seconds"] / record["ranks"] / 1e12
            cells = [f"{record['first_s']:.2f}", f"{record['seconds']:.2f}", f"{rate:.0f}"]
        sizes = [f"{record[name] / 1e9:.1f}" for name in ("peak_bytes", "weight_bytes", "kv_bytes")]
        rows.append([record["what"], str(record["ranks"]), *cells, *sizes, record["note"] or ""])
    columns = ("", "ranks", "first, s", "then, s", "TFLOP/s per rank", "peak, GB", "weights", "cache", "")
    print_table(columns, rows, f"prefill of {records[0]['context_tokens']} tokens")
