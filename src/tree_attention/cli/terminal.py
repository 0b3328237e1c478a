"""What the commands print and read: text on stdout, a progress bar and a table on stderr, lines of stdin."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator


def say(text: str) -> None:
    """Write to stdout and flush. Once the reader has closed it, write nowhere: a session may still be saved."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_lines() -> Iterator[str]:
    """Yield the lines of stdin, if it is open. Bytes that are not in its encoding become replacement characters."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin is not None:
        yield from iter(sys.stdin.readline, "")


@contextlib.contextmanager
def reading_bar(tokens: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with the remaining time. Yields a function to call with the number of tokens read so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as progress:
        task = progress.add_task("", total=tokens)
        yield lambda done: progress.update(task, completed=done)


def print_summary(rows: dict[str, str]) -> None:
    """Print a table with one row per name."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    Console(stderr=True).print(table)
