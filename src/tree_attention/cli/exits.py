"""How a command speaks and ends: what we raise on purpose is one line on stderr and an exit code."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from ..errors import TreeAttentionError


class RankDied(RuntimeError):
    """A rank ended before its work was done; the others were ended too."""


def run(command: Callable[[], int]) -> None:
    """Exit with what `command` returns: 1 if a rank died, 2 for a usage that cannot be, 130 if the user stopped it."""
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
        leave(code)
    raise typer.Exit(code)


def under_torchrun() -> bool:
    """Whether this process is one of torchrun's ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def say(text: str) -> None:
    """To stdout; to nowhere once nobody reads it any more: what is computed may still be saved."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """End a rank; not through the interpreter's own end, in which a thread of gloo's may abort though all is done."""
    say("")  # flushed
    os._exit(code)
