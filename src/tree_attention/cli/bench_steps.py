"""`tree-attention bench steps`: a whole model's decode step over the context, as a table and as records."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from ..bench.steps import SPLIT_WAYS, WAYS, measure
from ..errors import InputError
from .bench import numbers
from .bench_decode import PLAIN_MEMORY
from .launch import run_on_ranks
from .models import load_model
from .options import BenchStepsOptions


def bench_steps(options: BenchStepsOptions) -> int:
    """Measure on `nproc` ranks, print a table and one JSON document; returns the exit code."""
    config, nproc, tokens, tensor_parallel = options.config, options.nproc, options.tokens, options.tensor_parallel
    lengths = sorted(numbers("contexts", options.contexts))
    possible, where = (WAYS, "") if tensor_parallel == 1 else (SPLIT_WAYS, " with tensor-parallel")
    chosen = ways_of(config, options.variants, possible, where)
    if lengths[0] < 1 or nproc < 1 or tokens < 1:
        raise InputError(f"contexts, nproc and tokens must be at least 1, got {options.contexts}, {nproc} and {tokens}")
    os.environ.update(PLAIN_MEMORY)  # inherited by the ranks
    return run_on_ranks(
        _on_rank, nproc, options.device, str(config), lengths, chosen, tokens, tensor_parallel, options.output
    )


def _on_rank(
    config: str, lengths: list[int], ways: list[str], tokens: int, tensor_parallel: int, output: Path | None,
    device: torch.device,
) -> None:  # fmt: skip
    transformers.logging.set_verbosity_error()
    model = load_model(config, "auto", device, random=True, tensor_parallel=tensor_parallel)
    surroundings = surroundings_of(config, model, device) | {"tokens": tokens, "tensor_parallel": tensor_parallel}
    publish(lengths, lambda length: measure(model, [length], ways, tokens=tokens), _print, surroundings, output)


def ways_of(config: Path, ways: str, possible: Sequence[str], where: str = "") -> list[str]:
    """The ways that were asked for, if there are such; the config must be there, too."""
    if not config.is_file():
        raise InputError(f"config must be a model's config.json, got {config}")
    chosen = list(possible) if ways == "all" else ways.split(",")
    unknown = [way for way in chosen if way not in possible]
    if unknown:
        raise InputError(f"ways must be all or some of {', '.join(possible)}{where}, got {', '.join(unknown)!r}")
    return chosen


def publish(
    lengths: Sequence[int], take: Callable[[int], list[dict[str, Any]]], show: Callable[[list[dict[str, Any]]], None],
    surroundings: dict[str, Any], output: Path | None,
) -> None:  # fmt: skip
    """Measure each context on all ranks; the first one prints and keeps it as soon as it is done."""
    records, speaks = [], dist.get_rank() == 0
    for length in lengths:
        of_length = take(length)
        records += of_length
        if speaks:
            show(of_length)
        if speaks and output is not None:
            with output.open("a") as file:
                file.writelines(json.dumps(surroundings | record) + "\n" for record in of_length)
    if speaks:
        sys.stdout.write(json.dumps(surroundings | {"records": records}) + "\n")
        sys.stdout.flush()


def surroundings_of(config: str, model: Any, device: torch.device) -> dict[str, Any]:
    """What stands in every record of a whole model."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "model": Path(config).stem,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "transformers": transformers.__version__, "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip


def _print(records: list[dict[str, Any]]) -> None:
    table = Table(title=f"{records[0]['context_tokens']} tokens of context", title_justify="left")
    for name in ("", "ranks", "a token, ms", "TB/s a rank", "peak, GB", ""):
        table.add_column(name, justify="right" if name else "left")
    for record in records:
        cells = ["-", "-", "-"]
        if record["tpot_s"] is not None:
            rate = record["bytes"] / record["tpot_s"] / 1e12
            cells = [f"{1e3 * record['tpot_s']:.2f}", f"{rate:.2f}", f"{record['peak_bytes'] / 1e9:.1f}"]
        table.add_row(record["what"], str(record["ranks"]), *cells, record["note"] or "")
    Console(width=120).print(table)
    sys.stdout.flush()
