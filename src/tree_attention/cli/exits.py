"""How a command ends: what we raise on purpose is one line on stderr and an exit code."""

import sys
from collections.abc import Callable

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
    raise typer.Exit(code)
