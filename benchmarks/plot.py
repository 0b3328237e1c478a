"""Plots the records of `tree-attention bench decode` or `bench steps --output FILE.jsonl`. Requires matplotlib.

    python benchmarks/plot.py FILE.jsonl OUT.svg

Steps of a whole model: the time per token over the context, and the time to read every byte once. A decode step: the
first shape (batch, heads, layout, not ragged) in the file, over the keys per rank; left the time per step, right its
ratio to the fastest local peer. Times are those in a CUDA graph, or eager if a step could not be captured. If a case
was measured twice, the last record counts.
"""

import argparse
import json
from pathlib import Path

SHAPE = ("batch", "heads", "kv_heads", "head_dim", "layout", "ranks")
STYLES = {  # name -> label, colour, line, marker
    "fused": ("ours, fused: keys of all ranks", "#d1495b", "-", "o"),
    "fastest local peer": ("fastest local peer: own keys only", "#30638e", "-", "s"),
    "three_all_reduce": ("cuDNN + three all-reduces", "#8a8d91", "-", "^"),
    "all_gather": ("cuDNN + one all-gather", "#00798c", "-", "v"),
    "ring": ("cuDNN in a ring", "#edae49", "-", "D"),
    "roofline": ("roofline: every byte read once", "black", "--", None),
}
LOCAL = "fastest local peer"
OF_STEPS = {
    "ours compiled": ("ours, {} GPUs, compiled and captured", "#d1495b", "-", "o"),
    "ours captured": ("ours, {} GPUs, captured", "#d1495b", "-.", "^"),
    "split compiled": ("ours, {} GPUs, weights split, compiled and captured", "#edae49", "-", "o"),
    "split captured": ("ours, {} GPUs, weights split, captured", "#edae49", "-.", "^"),
    "stock compiled": ("transformers, one GPU, compiled static cache", "#30638e", "-", "s"),
    "stock eager": ("transformers, one GPU, eager", "#30638e", "-.", "v"),
}


def read(lines):
    """Return the first shape, and the lines to plot: name -> {keys per rank: seconds}."""
    records = [record for record in map(json.loads, lines) if not record["ragged"]]
    if not records:
        raise SystemExit("this file has no records without --ragged")
    shape = {name: records[0][name] for name in SHAPE}
    times_s = {name: {} for name in STYLES}
    last = {(record["keys"], record["what"]): record for record in records if shape.items() <= record.items()}
    for (keys, what), record in sorted(last.items()):
        time_s = record["graph_s"] or record["eager_s"]  # a step that cannot be captured has eager_s only
        times_s["roofline"][keys] = record["roofline_s"]
        if time_s and record["kind"] == "local":
            times_s[LOCAL][keys] = min(time_s, times_s[LOCAL].get(keys, time_s))
        elif time_s and what in times_s:
            times_s[what][keys] = time_s
    return shape, {name: line for name, line in times_s.items() if line}


def draw(times_s, title, out):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name, line in times_s.items():
        label, colour, style, marker = STYLES[name]
        how = {"color": colour, "linestyle": style, "marker": marker, "markersize": 5, "linewidth": 1.8}
        how |= {"zorder": 4 if name == "fused" else 3}
        left.plot(list(line), [1e6 * time_s for time_s in line.values()], label=label, **how)
        ratios = {
            keys: time_s / times_s[LOCAL][keys] for keys, time_s in line.items() if keys in times_s.get(LOCAL, {})
        }
        right.plot(list(ratios), list(ratios.values()), **how)
    keys = sorted(times_s["roofline"])
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(keys, [f"{count // 1024}k" if count % 1024 == 0 else str(count) for count in keys])
        axes.minorticks_off()
        axes.set_xlabel("keys per rank")
        axes.grid(alpha=0.25)
    left.set_yscale("log")
    left.set_ylabel("time per step, µs")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    right.set_ylabel("time / time of the fastest local peer")
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=160)


def _named(record):
    """The record, renamed from "ours" to "split" if its weights are split."""
    return (
        record | {"what": record["what"].replace("ours", "split")} if record.get("tensor_parallel", 1) > 1 else record
    )


def draw_steps(records, out):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from tree_attention.cost.machine import preset_machine

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    rate = preset_machine(records[0]["device"].split()[1].lower()).gpu.read_bytes_per_s
    timed = sorted((_named(record) for record in records if record["tpot_s"]), key=lambda r: r["context_tokens"])
    for what, (label, colour, style, marker) in OF_STEPS.items():
        line = [record for record in timed if record["what"] == what]
        if line:
            how = {"color": colour, "linestyle": style, "marker": marker, "label": label.format(line[0]["ranks"])}
            axes.plot([r["context_tokens"] for r in line], [1e3 * r["tpot_s"] for r in line], **how)
    for which, colour, where in (
        ("stock", "#30638e", "1 GPU"), ("ours", "#d1495b", "{} GPUs"), ("split", "#edae49", "{} GPUs, weights split")
    ):  # fmt: skip
        line = [record for record in timed if record["what"].startswith(which)]
        if line:
            read = {r["context_tokens"]: 1e3 * r["bytes"] / rate for r in line}
            label = f"every byte once at {rate / 1e12:.2f} TB/s, {where.format(line[0]['ranks'])}"
            axes.plot(list(read), list(read.values()), color=colour, linestyle=":", linewidth=1.2, label=label)
    contexts = sorted({record["context_tokens"] for record in timed})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{count // 1024}k" for count in contexts])
    axes.set_yscale("log")
    axes.set_yticks([3, 5, 10, 20, 50], ["3", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("ms per token")
    axes.grid(alpha=0.25)
    axes.set_title(f"{records[0]['model']}, {records[0]['dtype']}, {records[0]['device']}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(out, dpi=160)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path, help="svg or png")
    options = parser.parse_args(arguments)
    lines = options.file.read_text().splitlines()
    if "tpot_s" in json.loads(lines[0]):
        draw_steps([json.loads(line) for line in lines], options.out)
        return
    shape, times_s = read(lines)
    gpus = json.loads(lines[0]).get("gpus") or ["GPU"]
    title = (
        f"{shape['ranks']} x {gpus[0]}: batch {shape['batch']}, {shape['heads']} query and "
        f"{shape['kv_heads']} KV heads x {shape['head_dim']}, bfloat16, {shape['layout']}"
    )
    draw(times_s, title, options.out)


if __name__ == "__main__":
    main()
