"""How a command meets its caller: its exit code, text on stdout, errors and a bar on stderr, lines of stdin."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

import typer

from ..errors import TreeAttentionError


class RankDied(RuntimeError):
    """A rank ended before its work was done; the others were terminated."""


def run(command: Callable[[], int]) -> None:
    """Exit with the code that `command` returns; 1 if a rank died, 2 for an error of ours, 130 after Ctrl-C."""
    try:
        code = command()
    except (RankDied, TreeAttentionError) as error:
        sys.stderr.write(f"tree-attention: {error}\n")
        raise typer.Exit(1 if isinstance(error, RankDied) else 2) from None
    except KeyboardInterrupt:
        sys.stderr.write("tree-attention: stopped\n")
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def under_torchrun() -> bool:
    """Return True if this process is one of torchrun's ranks; TORCHELASTIC_RUN_ID alone may be inherited."""
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def end_process(code: int) -> NoReturn:
    """End this process at once. In a normal exit of the interpreter a gloo thread may abort after all work is done."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is None if it was closed before this process started
            say("", stream)  # flush
    os._exit(code)


def say(text: str, stream: TextIO | None = None) -> None:
    """Write to stdout, or a stream, and flush. Once its reader is gone, write nowhere: a session may still be saved."""
    stream = sys.stdout if stream is None else stream
    try:
        stream.write(text)
        stream.flush()
    except OSError:  # a broken pipe, a terminal that was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def read_lines() -> Iterator[str]:
    """Yield the lines of stdin, if it is open. Bytes that are not in its encoding become replacement characters."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin is not None:
        yield from iter(sys.stdin.readline, "")


@contextlib.contextmanager
def busy(what: str, *, shown: bool = True) -> Iterator[None]:
    """Show a spinner with a text at the terminal. Do not fork inside: a thread draws the spinner."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(what) if shown and console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def reading_bar(tokens: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with the remaining time. Yields a function to call with the number of tokens read so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console, start_s = Console(stderr=True), time.monotonic()
    hidden = not (shown and console.is_terminal)  # elsewhere an empty line would be left
    columns = (SpinnerColumn(), TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    columns = (*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task("", total=tokens, rate="")

        def on_progress(done: int) -> None:
            rate = done / max(time.monotonic() - start_s, 1e-6)
            progress.update(task, completed=done, rate=f"{rate:.0f} tokens/s")

        yield on_progress
