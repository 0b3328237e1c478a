"""Publishes benchmark records: a table per batch on stdout, JSON lines in a file, one JSON document at the end."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

Record = dict[str, Any]


def publish(
    batches: Iterable[list[Record]], show: Callable[[Any], None], about: Record, output: Path | None, key: str = ""
) -> list[Record]:
    """Show each batch and append it to `output` as soon as it is measured; return all records.

    The last line of stdout is one JSON document: the records with `about`, or with `about` under `key` if given. Every
    rank calls this, since measuring takes all of them. Only the first rank shows and writes.
    """
    records, is_first = [], dist.get_rank() == 0
    for batch in batches:
        records += batch
        if is_first:
            show(batch)
            sys.stdout.flush()
        if is_first and output is not None:
            with output.open("a") as file:
                file.writelines(json.dumps(about | record) + "\n" for record in batch)
    if is_first:
        sys.stdout.write(json.dumps(({key: about} if key else about) | {"records": records}) + "\n")
        sys.stdout.flush()
    return records


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table. Columns with a name are aligned right, columns without one left; no names, no header."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
