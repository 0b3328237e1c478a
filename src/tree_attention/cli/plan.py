"""`tree-attention plan`: the meshes for a model and a context as a table, JSON or a plot. Imports no torch."""

import json
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cost.machine import MACHINES, Machine, load_calibration, override, preset_machine
from ..cost.model import ModelSpec, load_model_spec
from ..cost.plan import MeshPlan, make_plan, over_contexts
from ..errors import InputError, Unavailable
from .options import PlanOptions, parse_size


def plan(options: PlanOptions) -> int:
    """Print the plan. Returns the exit code, 1 if nothing fits."""
    context = parse_size("context", options.context)
    if options.plot is not None and find_spec("matplotlib") is None:
        raise Unavailable("plot needs matplotlib: pip install matplotlib")
    try:
        model = load_model_spec(options.model)
        on, note = _machine(options)
        made = make_plan(model, on, context=context, batch=options.batch, gpus=options.gpus)
        if options.plot is not None:
            rows = over_contexts(model, on, batch=options.batch, gpus=options.gpus)
            _plot(rows, _title(options, model, on), options.plot)
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


def _plot(rows: list[tuple[int, float | None, float | None]], title: str, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for column, label, colour in ((1, "tensor parallelism only", "tab:blue"), (2, "sequence sharded", "tab:red")):
        points = [(row[0], 1e3 * token_s) for row in rows if (token_s := row[column]) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda token_ms, _: f"{token_ms:g}")
    contexts = [row[0] for row in rows][::2]
    axes.set_xticks(contexts, [f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}k" for n in contexts])
    axes.minorticks_off()
    axes.set(xlabel="tokens per sequence", ylabel="ms per token on the fastest mesh that fits")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    try:
        figure.savefig(out, dpi=160)
    except OSError as error:
        raise ValueError(f"plot {out} cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)
