"""How a command ends: its exit code, and one line on stderr for an error of ours."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from ..errors import TreeAttentionError
from .terminal import say


class RankDied(RuntimeError):
    """A rank ended before its work was done; the others were terminated."""


def run(command: Callable[[], int]) -> None:
    """Exit with the code that `command` returns; 1 if a rank died, 2 for an error of ours, 130 after Ctrl-C."""
    try:
        code = command()
    except RankDied as death:
        sys.stderr.write(f"tree-attention: {death}\n")
        raise typer.Exit(1) from None
    except TreeAttentionError as error:
        sys.stderr.write(f"tree-attention: {error}\n")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("tree-attention: stopped\n")
        raise typer.Exit(130) from None
    if under_torchrun():
        exit_rank(code)
    raise typer.Exit(code)


def under_torchrun() -> bool:
    """Return True if this process is one of torchrun's ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def exit_rank(code: int) -> NoReturn:
    """End this process at once. In a normal exit of the interpreter a gloo thread may abort after all work is done."""
    say("")  # flush
    os._exit(code)
