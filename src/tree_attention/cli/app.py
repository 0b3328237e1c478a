"""The commands of `tree-attention`: each takes its options from options.py and its work from a file of its own.

A command imports its work when it is called: torch and transformers take seconds, `--help` and `plan` need neither.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from . import options as flags
from .exits import run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Benchmarks. Each checks its results before it times them.", no_args_is_help=True)
app.add_typer(bench, name="bench")


def command(
    name: str, options_type: type, *, group: typer.Typer = app, needs_transformers: bool = False
) -> Callable[[Any], Any]:
    """Decorator: register a function of `options_type` as a command with one flag per field of that dataclass."""

    def register(function: Callable[[Any], int]) -> None:
        def call(**values: Any) -> None:
            if needs_transformers and find_spec("transformers") is None:
                full_name = f"tree-attention {name}" if group is app else f"tree-attention bench {name}"
                sys.exit(f"{full_name} needs transformers: pip install 'tree-attention[hf]'")
            run(lambda: function(options_type(**values)))

        call.__doc__ = function.__doc__
        call.__dict__["__signature__"] = _signature(options_type)
        group.command(name)(call)

    return register


def _signature(options_type: type) -> inspect.Signature:
    """One parameter per field: the command's own first, then those it shares."""
    parameters = []
    for field in sorted(fields(options_type), key=lambda field: field.name not in options_type.__annotations__):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, kind, annotation=field.type, default=default))
    return inspect.Signature(parameters)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        sys.stdout.write(f"tree-attention {__version__}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Exact attention over a KV cache that is sharded across ranks."""


@command("generate", flags.GenerateOptions, needs_transformers=True)
def generate(options: flags.GenerateOptions) -> int:
    """Read a document into a KV cache that is sharded across ranks, and generate an answer.

    Starts its own ranks; under torchrun, this process is one of them. Exit code 1: a rank died, or --verify found
    different tokens. Exit code 2: an invalid argument.
    """
    from .generate import generate_on_ranks

    return generate_on_ranks(options)


@command("chat", flags.ChatOptions, needs_transformers=True)
def chat(options: flags.ChatOptions) -> int:
    """Answer questions about a document: one per line of stdin. The answers stream to stdout."""
    from .chat import chat_on_ranks

    return chat_on_ranks(options)


@command("plan", flags.PlanOptions)
def plan(options: flags.PlanOptions) -> int:
    """Estimate how many GPUs a model and a context need, how fast they decode, and whether sequence sharding pays.

    Computed from a few constants of the machine, see docs/planning.md; nothing is run. Exit code 1: nothing fits.
    """
    from .plan import plan

    return plan(options)


@command("calibrate", flags.CalibrateOptions)
def calibrate(options: flags.CalibrateOptions) -> int:
    """Measure this machine: read bandwidth, matrix products, kernel launches, messages and collectives."""
    from .calibrate import calibrate

    return calibrate(options)


@command("info", flags.InfoOptions)
def info(options: flags.InfoOptions) -> int:
    """Show versions, devices and links, the available backends and algorithms, and what "auto" chooses for a shape."""
    from .info import info

    return info(options)


@command("generate", flags.BenchGenerateOptions, group=bench, needs_transformers=True)
def bench_generate(options: flags.BenchGenerateOptions) -> int:
    """Compare ranks with one process (CPU, float32, one core each): time to first token, time per token, KV memory."""
    from .bench import bench_generate

    return bench_generate(options)


@command("decode", flags.BenchDecodeOptions, group=bench)
def bench_decode(options: flags.BenchDecodeOptions) -> int:
    """Time one decode step on GPUs against other kernels, other exchanges and the memory bandwidth.

    Exit code 1: a result of ours was wrong.
    """
    from .bench_decode import bench_decode

    return bench_decode(options)


@command("steps", flags.BenchStepsOptions, group=bench, needs_transformers=True)
def bench_steps(options: flags.BenchStepsOptions) -> int:
    """Time the decode step of a whole model as `generate` runs it, on caches filled with random numbers."""
    from .bench_steps import bench_steps

    return bench_steps(options)


@command("prefill", flags.BenchPrefillOptions, group=bench, needs_transformers=True)
def bench_prefill(options: flags.BenchPrefillOptions) -> int:
    """Time the prefill of a long prompt through a whole model, and measure its memory."""
    from .bench_prefill import bench_prefill

    return bench_prefill(options)
