"""The commands of `tree-attention`: each takes its options from options.py and its work from a file of its own.

A command imports its work when it is called: torch and transformers take seconds, `--help` and `plan` need neither.
"""

import inspect
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, get_args

import typer

from ..errors import InputError
from . import options
from .terminal import busy, run

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings=HELP)
bench = typer.Typer(help="Benchmarks. Each checks its results before it times them.", no_args_is_help=True)


def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Exact attention over a KV cache that is sharded across ranks."""
    if version:
        from .. import __version__

        sys.stdout.write(f"tree-attention {__version__}\n")
        raise typer.Exit


def add_command(name: str, options_type: Any, work: str, *, needs_transformers: bool = False) -> None:
    """Register a command with one flag per field of a dataclass, whose docstring is its help.

    name: words after `tree-attention`. work: "module.function" of this package, which takes the options and returns the
    exit code.
    """

    def command(**values: Any) -> None:
        if needs_transformers and find_spec("transformers") is None:
            sys.exit(f"tree-attention {name} needs transformers: pip install 'tree-attention[hf]'")
        module, function = work.split(".")

        def call() -> int:
            options.check_files(values)
            with busy("starting"):
                started = getattr(import_module(f".{module}", __package__), function)
            return started(options_type(**values))

        run(call)

    command.__doc__ = options_type.__doc__
    command.__dict__["__signature__"] = _signature(options_type)
    (bench if name.startswith("bench ") else app).command(name.removeprefix("bench "))(command)


def _tokens(given: str | int) -> int:
    """Parse a number of tokens, unless it is a default."""
    try:
        return options.parse_size("tokens", given) if isinstance(given, str) else given
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def _signature(options_type: Any) -> inspect.Signature:
    """One parameter per field: the command's own first, then those that it shares."""
    parameters = []
    for field in sorted(fields(options_type), key=lambda field: field.name not in options_type.__annotations__):
        kind, *names, text = get_args(field.type)
        parser = _tokens if field.name.endswith("_tokens") else None
        flag = Annotated[kind, typer.Option(*names, help=text, parser=parser)]
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        parameter = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=flag, default=default)
        parameters.append(parameter)
    return inspect.Signature(parameters)


app.callback(invoke_without_command=True)(main)
add_command("generate", options.GenerateOptions, "generate.generate_on_ranks", needs_transformers=True)
add_command("chat", options.ChatOptions, "chat.chat_on_ranks", needs_transformers=True)
add_command("verify", options.VerifyOptions, "verify.verify_on_ranks", needs_transformers=True)
add_command("plan", options.PlanOptions, "plan.plan")
add_command("calibrate", options.CalibrateOptions, "calibrate.calibrate")
add_command("info", options.InfoOptions, "info.info")
app.add_typer(bench, name="bench")
add_command("bench generate", options.BenchGenerateOptions, "bench_generate.bench_generate", needs_transformers=True)
add_command("bench decode", options.BenchDecodeOptions, "bench_decode.bench_decode")
add_command("bench steps", options.BenchStepsOptions, "bench_model.bench_steps", needs_transformers=True)
add_command("bench prefill", options.BenchPrefillOptions, "bench_model.bench_prefill", needs_transformers=True)
