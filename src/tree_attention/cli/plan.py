"""`tree-attention plan`: the meshes for a model and a context as a table, JSON or a plot. Imports no torch."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cost.machine import MACHINES, Machine, load_calibration, override, preset_machine
from ..cost.model import ModelSpec, load_model_spec
from ..cost.plan import MeshPlan, make_plan, over_contexts
from ..errors import InputError
from .options import PlanOptions, parse_size
from .plots import Lines, draw, short


def plan(options: PlanOptions) -> int:
    """Print the plan. Returns the exit code, 1 if nothing fits."""
    context = parse_size("context", options.context)
    try:
        model = load_model_spec(options.model)
        on, note = _machine(options)
        made = make_plan(model, on, context=context, batch=options.batch, gpus=options.gpus)
        if options.plot is not None:
            rows = over_contexts(model, on, batch=options.batch, gpus=options.gpus)
            _plot(rows, made.pays_from_tokens, _title(options, model, on), options.plot)
    except ValueError as error:
        raise InputError(str(error)) from None
    made = replace(made, notes=(*made.notes, *([note] if note else [])))
    if options.as_json:
        about = {"model": model.name, "context_tokens": context, "batch": options.batch, "machine": asdict(on)}
        sys.stdout.write(json.dumps(about | made.as_dict()) + "\n")
    else:
        _print(made, f"{_title(options, model, on)}, {context} tokens each")
    return 0 if made.fewest is not None else 1


def _machine(options: PlanOptions) -> tuple[Machine, str]:
    if (options.gpu is None) == (options.machine is None):
        raise ValueError(f"name one of --gpu ({', '.join(MACHINES)}) and --machine FILE")
    how: Any = {"per_node": options.per_node, "inside": options.inside, "across": options.across}
    if options.gpu is not None:
        return preset_machine(options.gpu, **how), ""
    assert options.machine is not None
    found = load_calibration(options.machine)
    return override(found.machine, **how), f"constants measured on {found.hardware}, {found.date}"


def _title(options: PlanOptions, model: ModelSpec, on: Machine) -> str:
    return f"{model.name} on up to {options.gpus} x {on.name}, {on.per_node} per node: {options.batch} sequence(s)"


def _print(made: MeshPlan, title: str) -> None:
    console = Console(width=120, highlight=False)
    table = Table(title=title, title_justify="left")
    table.add_column("tensor x\nsequence")
    sizes, times = ("weights,\nGB per GPU", "KV", "total", ""), ("ms per\ntoken", "largest\npart", "exchange")
    for name in (*sizes, *times, "first token,\ns", "tokens/s"):
        table.add_column(name, justify="right")
    for mesh in made.meshes:
        style = "bold" if mesh is made.fastest else ("" if mesh.fits and mesh.loadable else "dim")
        verdict = ("fits" if mesh.loadable else "other engines") if mesh.fits else "too large"
        sizes = (f"{size / 1e9:.1f}" for size in (mesh.weights_bytes, mesh.kv_bytes, mesh.used_bytes))
        exchange = "-" if mesh.sequence == 1 else mesh.algorithm
        times = (f"{1e3 * mesh.token_s:.2f}", mesh.bound, exchange, f"{mesh.first_token_s:.2f}")
        shape, rate = f"{mesh.tensor} x {mesh.sequence}", f"{mesh.tokens_per_s:.1f}"
        table.add_row(shape, *sizes, verdict, *times, rate, style=style)
    console.print(table)
    for name, mesh in (("fewest GPUs", made.fewest), ("fastest", made.fastest)):
        if mesh is not None:
            shape = f"{mesh.tensor} x {mesh.sequence}, {mesh.gpus} GPUs"
            console.print(f"{name}: {shape}, {1e3 * mesh.token_s:.2f} ms per token")
    console.print(f"[bold]{made.verdict}[/bold]")
    if made.pays_from_tokens is None:
        console.print("Without sequence sharding is fastest at every context that fits.")
    else:
        console.print(f"From {made.pays_from_tokens} tokens per sequence on, the fastest mesh shards the sequence.")
    for note in made.notes:
        console.print(f"note: {note}", markup=False)


def _plot(rows: list[tuple[int, float | None, float | None]], pays_from: int | None, title: str, out: Path) -> None:
    lines: Lines = {}
    for column, label in ((1, "tensor parallelism only"), (2, "sequence sharded")):
        lines[label] = [(row[0], 1e3 * token_s) for row in rows if (token_s := row[column]) is not None]
    mark = None if pays_from is None else (pays_from, f"sequence sharding pays from {short(pays_from)} tokens on")
    draw(out, lines, title=title, x="tokens per sequence", y="ms per token on the fastest mesh that fits", mark=mark)
