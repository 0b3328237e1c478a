"""Draw the records of `tree-attention bench decode --output FILE.jsonl` or `bench steps`. Needs matplotlib.

    python benchmarks/plot.py FILE.jsonl OUT.svg
    python benchmarks/plot.py FILE.jsonl OUT.svg --readme     OUT-light.svg and OUT-dark.svg: the left panel alone

Decode steps: the first shape in the file (batch, heads, layout; not ragged), over the keys per rank. Left, the time of
a step; right, the same over the time of the fastest local peer. Times are of CUDA graphs, or eager if a step could
not be captured. Steps of a whole model: the time per token over the context, and the time to read every byte once. If
a case was measured twice, the last record counts.
"""

import argparse
import json
from pathlib import Path

SHAPE = ("batch", "heads", "kv_heads", "head_dim", "layout", "ranks")
STYLES = {  # name -> label, color, line, marker
    "fused": ("ours, fused: all ranks' keys", "#d1495b", "-", "o"),
    "fastest local peer": ("fastest local peer: own keys only", "#30638e", "-", "s"),
    "three_all_reduce": ("cuDNN + three all-reduces", "#8a8d91", "-", "^"),
    "all_gather": ("cuDNN + one all-gather", "#00798c", "-", "v"),
    "ring": ("cuDNN in a ring", "#edae49", "-", "D"),
    "roofline": ("roofline: every byte read once", "black", "--", None),
}
LOCAL = "fastest local peer"
THEMES = {  # name -> color of text and axes, and what replaces colors that would not show
    "light": ("#1f2328", {}),
    "dark": ("#e6edf3", {"black": "#e6edf3", "#30638e": "#6cb6ff", "#00798c": "#2bb7c9"}),
}
STEP_COLORS = {"stock": "#30638e", "ours": ("#d1495b", "#edae49", "#00798c", "#8a8d91")}  # ours: by mesh
STEP_LINES = {"compiled": ("-", "o"), "captured": ("-.", "^"), "eager": (":", "v")}


def read(lines):
    """The first shape, and the lines to draw: name -> {keys per rank: seconds}."""
    records = [record for record in map(json.loads, lines) if not record["ragged"]]
    if not records:
        raise SystemExit("no records without lengths in this file")
    shape = {name: records[0][name] for name in SHAPE}
    times_s = {name: {} for name in STYLES}
    last = {(record["keys"], record["what"]): record for record in records if shape.items() <= record.items()}
    for (keys, what), record in sorted(last.items()):
        time_s = record["graph_s"] or record["eager_s"]  # a step that cannot be captured has the second only
        times_s["roofline"][keys] = record["roofline_s"]
        if time_s and record["kind"] == "local":
            times_s[LOCAL][keys] = min(time_s, times_s[LOCAL].get(keys, time_s))
        elif time_s and what in times_s:
            times_s[what][keys] = time_s
    return shape, {name: line for name, line in times_s.items() if line}


def draw(times_s, title, out):
    plt = pyplot("light")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    draw_times(left, times_s, "light")
    for name, line in times_s.items():
        ratios = {
            keys: time_s / times_s[LOCAL][keys] for keys, time_s in line.items() if keys in times_s.get(LOCAL, {})
        }
        right.plot(list(ratios), list(ratios.values()), **style(name, "light"))
    label_keys(right, times_s)
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    right.set_ylabel("time over that of the fastest local peer")
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=160, metadata=undated(out))


def draw_for_readme(times_s, out):
    for theme in THEMES:
        figure, axes = pyplot(theme).subplots(figsize=(8, 4.6), layout="constrained")
        draw_times(axes, times_s, theme)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(out.with_stem(f"{out.stem}-{theme}"), transparent=True, dpi=160, metadata=undated(out))


def draw_times(axes, times_s, theme):
    for name, line in times_s.items():
        axes.plot(list(line), [1e6 * time_s for time_s in line.values()], label=STYLES[name][0], **style(name, theme))
    label_keys(axes, times_s)
    axes.set_yscale("log")
    axes.set_ylabel("time of a step, µs")


def style(name, theme):
    _, color, line, marker = STYLES[name]
    color = THEMES[theme][1].get(color, color)
    how = {"color": color, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.8}
    return how | {"zorder": 4 if name == "fused" else 3}


def label_keys(axes, times_s):
    keys = sorted(times_s["roofline"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(keys, [f"{count // 1024}k" if count % 1024 == 0 else str(count) for count in keys])
    axes.minorticks_off()
    axes.set_xlabel("keys per rank")
    axes.grid(alpha=0.25)


def draw_steps(records, out):
    from tree_attention.cost.machine import preset_machine

    figure, axes = pyplot("light").subplots(figsize=(7.5, 5), layout="constrained")
    rate = preset_machine(records[0]["device"].split()[1].lower()).gpu.read_bytes_per_s
    timed = sorted((record for record in records if record["tpot_s"]), key=lambda record: record["context_tokens"])
    meshes = sorted({mesh_of(record) for record in timed if record["what"].startswith("ours")})
    colors = dict(zip(meshes, STEP_COLORS["ours"], strict=False))
    for what, mesh in sorted({(record["what"], mesh_of(record)) for record in timed}):
        line = [record for record in timed if (record["what"], mesh_of(record)) == (what, mesh)]
        who, how = what.split()
        color = STEP_COLORS["stock"] if who == "stock" else colors[mesh]
        named = "transformers, one GPU" if who == "stock" else f"ours, {mesh[0]} x {mesh[1]} (tensor x sequence)"
        linestyle, marker = STEP_LINES[how]
        contexts = [record["context_tokens"] for record in line]
        axes.plot(contexts, [1e3 * record["tpot_s"] for record in line], color=color, linestyle=linestyle,
                  marker=marker, label=f"{named}, {how}")  # fmt: skip
    for mesh in meshes:
        line = {
            r["context_tokens"]: 1e3 * r["bytes"] / rate for r in timed if mesh_of(r) == mesh and "ours" in r["what"]
        }
        label = f"every byte once at {rate / 1e12:.2f} TB/s, {mesh[0]} x {mesh[1]}"
        axes.plot(list(line), list(line.values()), color=colors[mesh], linestyle="--", linewidth=1.0, label=label)
    contexts = sorted({record["context_tokens"] for record in timed})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{count // 1024}k" for count in contexts])
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 3, 5, 10, 20, 50], ["1", "2", "3", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms per token")
    axes.grid(alpha=0.25)
    axes.set_title(f"{records[0]['model']}, {records[0]['dtype']}, {records[0]['device']}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(out, dpi=160, metadata=undated(out))


def mesh_of(record):
    """Tensor ranks and sequence ranks."""
    tensor = record.get("tensor_parallel", 1)
    return tensor, record["ranks"] // tensor


def pyplot(theme):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ink = THEMES[theme][0] if theme == "dark" else "black"
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    plt.rcParams.update({"svg.hashsalt": "tree-attention", "grid.color": ink})
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        plt.rcParams[name] = ink
    return plt


def undated(out):
    """The same records give the same file."""
    return {"Date": None} if out.suffix == ".svg" else None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path, help="svg or png")
    parser.add_argument("--readme", action="store_true", help="decode steps: one panel, for light and for dark pages")
    options = parser.parse_args(arguments)
    lines = options.file.read_text().splitlines()
    if "tpot_s" in json.loads(lines[0]):
        draw_steps([json.loads(line) for line in lines], options.out)
        return
    shape, times_s = read(lines)
    if options.readme:
        draw_for_readme(times_s, options.out)
        return
    gpus = json.loads(lines[0]).get("gpus") or ["GPU"]
    title = (
        f"{shape['ranks']} x {gpus[0]}: batch {shape['batch']}, {shape['heads']} query and "
        f"{shape['kv_heads']} KV heads x {shape['head_dim']}, bfloat16, {shape['layout']}"
    )
    draw(times_s, title, options.out)


if __name__ == "__main__":
    main()
