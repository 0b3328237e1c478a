"""The charts that `--plot` writes. matplotlib is loaded when one is drawn."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

Lines = dict[str, list[tuple[float, float]]]  # label -> points


def draw(
    out: Path, lines: Lines, *, title: str, x: str, y: str, of_size: bool = True, mark: tuple[float, str] | None = None
) -> None:
    """Draw lines into a .png or .svg file.

    of_size: x is a number of tokens or keys, on an axis of powers of 2, and y an axis of powers of 2 as well. mark: a
    place on the x axis and what is there.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in lines.items():
        if points:
            axes.plot(*zip(*sorted(points), strict=True), label=label, marker="o", markersize=4)
    if mark is not None:
        axes.axvline(mark[0], color="gray", linestyle="--", linewidth=1, label=mark[1])
    if of_size:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        sizes = sorted({size for points in lines.values() for size, _ in points})
        axes.set_xticks(sizes[:: 1 + len(sizes) // 8], map(short, sizes[:: 1 + len(sizes) // 8]))
        axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    try:
        figure.savefig(out, dpi=160)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise InputError(f"plot {out} cannot be written: {error}") from None
    finally:
        plt.close(figure)


def short(size: float) -> str:
    """Format a number of tokens: 131072 -> "128k"."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if size >= unit and size % unit == 0:
            return f"{size / unit:g}{name}"
    return f"{size:g}"


def draw_records(
    out: Path, records: Iterable[dict[str, Any]], value: str, scale: float, *, title: str, x: Sequence[str], y: str
) -> None:
    """Draw `scale` times the field `value` of benchmark records, a line for each contestant.

    x: the field to draw over, and its name on the axis.
    """
    lines: Lines = {}
    for record in records:
        if record[value] is not None:
            ranks = "1 rank" if record["ranks"] == 1 else f"{record['ranks']} ranks"
            lines.setdefault(f"{record['what']}, {ranks}", []).append((record[x[0]], scale * record[value]))
    draw(out, lines, title=title, x=x[1], y=y)
