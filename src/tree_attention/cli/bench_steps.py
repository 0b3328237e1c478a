"""`tree-attention bench steps`: a whole model's decode step over the context, as a table and as records."""

import json
import os
import sys
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
from .inputs import load_model
from .launch import run_on_ranks


def bench_steps(
    config: Path, nproc: int, contexts: str, ways: str, tokens: int, tensor_parallel: int, device: str,
    output: Path | None,
) -> int:  # fmt: skip
    """Measure on `nproc` ranks, print a table and one JSON document; returns the exit code."""
    possible = list(WAYS) if tensor_parallel == 1 else [way for way in WAYS if way in SPLIT_WAYS]
    lengths, chosen = sorted(numbers("contexts", contexts)), possible if ways == "all" else ways.split(",")
    if not config.is_file():
        raise InputError(f"config must be a model's config.json, got {config}")
    if lengths[0] < 1 or nproc < 1 or tokens < 1:
        raise InputError(f"contexts, nproc and tokens must be at least 1, got {contexts}, {nproc} and {tokens}")
    unknown = [way for way in chosen if way not in possible]
    if unknown:
        split = " with tensor-parallel" if tensor_parallel != 1 else ""
        raise InputError(f"ways must be all or some of {', '.join(possible)}{split}, got {', '.join(unknown)!r}")
    os.environ.update(PLAIN_MEMORY)  # inherited by the ranks
    return run_on_ranks(_on_rank, nproc, device, str(config), lengths, chosen, tokens, tensor_parallel, output)


def _on_rank(
    config: str, lengths: list[int], ways: list[str], tokens: int, tensor_parallel: int, output: Path | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Each context is printed and kept as soon as it is done."""
    transformers.logging.set_verbosity_error()
    model = load_model(config, "auto", device, random=True, tensor_parallel=tensor_parallel)
    speaks = dist.get_rank() == 0
    surroundings = surroundings_of(config, model, device) | {"tokens": tokens, "tensor_parallel": tensor_parallel}
    records: list[dict[str, Any]] = []
    for length in lengths:
        of_length = measure(model, [length], ways, tokens=tokens)
        records += of_length
        if speaks:
            _print(of_length)
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
