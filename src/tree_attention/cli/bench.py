"""`tree-attention bench generate`: ranks against one process, as a table and as records."""

import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from .checks import check_model_folder
from .launch import run_on_ranks
from .options import BenchGenerateOptions

CHUNK_TOKENS = 1024


def bench_generate(options: BenchGenerateOptions) -> int:
    """Measure on `nproc` ranks, print the table and one JSON document; returns the exit code."""
    model, nproc, output = options.model, options.nproc, options.output
    decode_tokens, rounds = options.decode_tokens, options.rounds
    check_model_folder(model)
    lengths = sorted(numbers("contexts", options.contexts))
    if lengths[0] < 1 or nproc < 2 or decode_tokens < 1 or rounds < 1:
        raise InputError("contexts, decode-tokens and rounds must be at least 1, nproc at least 2")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "records.json"
        code = run_on_ranks(_on_rank, nproc, "cpu", model, lengths, decode_tokens, rounds, str(result))
        if code:
            return code
        records = json.loads(result.read_text())
    surroundings = _surroundings(model)
    _print(records, nproc)
    if output is not None:
        with output.open("a") as file:
            file.writelines(json.dumps(surroundings | record) + "\n" for record in records)
    sys.stdout.write(json.dumps(surroundings | {"records": records}) + "\n")
    return 0


def numbers(name: str, text: str) -> list[int]:
    """ "1,2,3" -> [1, 2, 3], or InputError."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"{name} must be numbers with commas between them, got {text!r}") from None


def _on_rank(
    model: str, lengths: list[int], decode_tokens: int, rounds: int, result: str, device: torch.device
) -> None:
    from transformers import AutoTokenizer  # seconds, which only ranks need to wait for

    from ..bench.generation import measure

    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=10**9)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : lengths[-1]]
    if ids.shape[1] < lengths[-1]:
        raise InputError(f"contexts must be at most the {ids.shape[1]} tokens of the text, got {lengths[-1]}")
    records = measure(model, ids, lengths, decode_tokens=decode_tokens, chunk_tokens=CHUNK_TOKENS, rounds=rounds)
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(records))


def _print(records: list[dict[str, Any]], nproc: int) -> None:
    """A row for each context; the ratios are to the faster of the two one-process runs."""
    table = Table(title="CPU, float32, each process on one core", title_justify="left")
    for name in ("context", "", "first token, s", "a token, ms", "KV a rank, MB", "ratio: reading", "writing", "KV"):
        table.add_column(name, justify="left" if not name else "right")
    for context in sorted({record["context_tokens"] for record in records}):
        rows = [record for record in records if record["context_tokens"] == context]
        one = [record for record in rows if record["ranks"] == 1 and record["what"] != "apart"]
        ttft, tpot = (min(record[key] for record in one) for key in ("ttft_s", "tpot_s"))
        for record in rows:
            ours = f"ours, {record['ranks']} rank(s)"
            name = {"stock": "transformers, sdpa", "apart": f"{nproc} x ours apart"}.get(record["what"], ours)
            cells = [
                f"{record['ttft_s']:.2f}",
                f"{1e3 * record['tpot_s']:.1f}",
                f"{record['kv_bytes_per_rank'] / 1e6:.1f}",
            ]
            if record["ranks"] == nproc:
                kv = record["kv_bytes_per_rank"] / one[0]["kv_bytes_per_rank"]
                cells += [f"{ttft / record['ttft_s']:.2f} x faster", f"{record['tpot_s'] / tpot:.2f} x", f"{kv:.3f} x"]
            table.add_row(str(context), name, *cells)
    Console(width=120).print(table)


def _surroundings(model: str) -> dict[str, str]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "model": Path(model).name,
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
