"""Reproduces the paper's evaluation: writes docs/reproduction.md with its figures, and the records behind them.

    python benchmarks/reproduction.py [--docs docs] [--records benchmarks/results/reproduction.jsonl]

Takes some minutes and 5 GB of memory. Requires matplotlib. reproduction_ranks.py measures bytes, calls, peak memory and
errors on CPU ranks. reproduction_simulated.py simulates, and reads the records of GPUs.
"""

import argparse
import json
from pathlib import Path

import reproduction_ranks
import reproduction_simulated as simulated
from reproduction_page import page, tokens
from reproduction_ranks import MEMORY_KEYS
from reproduction_simulated import LABELS, SAMPLES, TOKENS


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--records", type=Path, default=Path("benchmarks/results/reproduction.jsonl"))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="samples for the error bar of the ratio")
    parser.add_argument("--memory-keys", type=int, default=MEMORY_KEYS, help="keys per rank where memory is counted")
    options = parser.parse_args(arguments)
    found = sections(options.samples, options.memory_keys)
    draw(found["figure 3"], options.docs / "figures" / "figure3.svg")
    (options.docs / "reproduction.md").write_text(page(found) + "\n")
    lines = [json.dumps({"section": name} | row) for name, rows in found.items() for row in rows]
    options.records.write_text("\n".join(lines) + "\n")


def sections(samples, memory_keys):
    """Return the rows of each section, from which the page and the records are made."""
    counted = reproduction_ranks.count_on_ranks(memory_keys)
    exchange, fits = simulated.asymptotics()
    return {
        "figure 3": simulated.figure_3() + simulated.measured(), "ratio": simulated.ratios(samples),
        "exchange": exchange, "fit": fits, "volume": simulated.volumes(),
        "traffic": simulated.beside(counted["traffic"]), "wire": counted["wire"], "memory": counted["memory"],
        "gpu peak": simulated.gpu_peaks(), "error": counted["error"], "algebra": counted["algebra"],
        "overlap": [simulated.overlap()], "hosts": [simulated.across_hosts()], "end to end": simulated.end_to_end(),
        "whole model": simulated.whole_model(),
    }  # fmt: skip


def draw(points, out):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    plt.rcParams["svg.hashsalt"] = "reproduction"  # reproducible file
    figure, panels = plt.subplots(1, 4, figsize=(14, 4.4), layout="constrained", sharey=True)
    colours = {"ring": "#edae49", "all_reduce": "#8a8d91", "ours": "#d1495b"}
    for axes, ranks in zip(panels, (2, 8, 64, 128), strict=True):
        rows = [row for row in points if row["gpus"] == ranks]
        for name, label in LABELS.items():
            line = [row for row in rows if row["what"] == name]
            counts = [row["tokens"] for row in line]
            times_ms = [1e3 * row["seconds"] for row in line]
            style = {"color": colours[name], "marker": "o", "markersize": 4}
            filled = style if ranks == 2 else style | {"markerfacecolor": "white", "linestyle": "--"}
            axes.plot(counts, times_ms, label=label, **filled)
        axes.set_title(f"{ranks} GPUs, {'measured' if ranks == 2 else 'simulated'}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(TOKENS[::2], [*map(tokens, TOKENS[::2])])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("time of one attention block, ms")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
