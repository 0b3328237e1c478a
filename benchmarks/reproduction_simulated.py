"""The paper's figures by simulation (tree_attention.cost.simulate, H100 nodes of 8), and what records of GPUs say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from simulator.simulate import simulate
from tree_attention.cost.decode import AttentionShape
from tree_attention.cost.machine import preset_machine
from tree_attention.cost.mesh import estimate_first_token_s, estimate_mesh, layer_shape
from tree_attention.cost.model import load_model_spec

K = 1024
TOKENS = [80 * K << i for i in range(7)]  # 80k to 5.12M
GPUS = (8, 16, 32, 64, 128)
BLOCK = AttentionShape(batch=1, heads=16, kv_heads=16, head_dim=128, keys=0)  # the paper's attention block, bfloat16
H100 = preset_machine("h100")
READ_TOKEN_S = replace(BLOCK, keys=1).kv_bytes / H100.gpu.read_bytes_per_s
JITTER = {"kernel_jitter": 0.02, "link_jitter": 0.2}  # assumed
SAMPLES, SPREAD = 100, 0.3
RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "2026-11-25_2xH100_paper.jsonl"
EMULATED = RESULTS / "2026-11-24_two-level_emulated.jsonl"
WHOLE_MODEL = [RESULTS / f"2026-11-24_2xH200_{what}.jsonl" for what in ("prefill", "steps")]
LLAMA, DECODED = load_model_spec("llama-3.1-8b"), 10
PEAK_FLOPS_PER_S = 989e12  # of an H100, data sheet: 16 bits, dense
PAPER_S = {32: (0.60, 2.57), 64: (1.08, 4.42), 128: (2.68, 6.38), 256: (2.89, 8.19)}  # table 1: k tokens: tree, ring
LABELS = {"ring": "ring", "all_reduce": "tree, Algorithm 3", "ours": "ours"}


def ours(ranks):
    return "fused" if ranks <= H100.per_node else "two_level"


def block_s(name, tokens, ranks, *, where=H100, steps=20, seed=0):
    """Mean seconds of one attention block, jitter included."""
    shape = replace(BLOCK, keys=tokens / ranks)
    algorithm = ours(ranks) if name == "ours" else name
    return simulate(shape, where, ranks, algorithm, steps=steps, seed=seed, **JITTER).mean_s


def figure_3():
    """Every point of the paper's figure, simulated."""
    return [
        {"what": name, "gpus": ranks, "tokens": tokens, "seconds": block_s(name, tokens, ranks), "how": "simulated"}
        for ranks in GPUS
        for tokens in TOKENS
        for name in LABELS
    ]


def measured(path=MEASURED):
    """Of the same block on two GPUs: what was measured, and what the simulator says without jitter."""
    names = {"ring": "ring", "three_all_reduce": "all_reduce", "fused": "ours"}
    found = []
    for record in map(json.loads, path.read_text().splitlines()):
        if record["what"] in names:
            name = names[record["what"]]
            row = {"what": name, "gpus": record["ranks"], "tokens": record["ranks"] * record["keys"]}
            shape = replace(BLOCK, keys=record["keys"])
            run = simulate(shape, H100, record["ranks"], "fused" if name == "ours" else name)
            found.append(row | {"seconds": record["graph_s"], "how": "measured", "simulated_s": run.mean_s})
    return sorted(found, key=lambda row: (row["tokens"], row["what"]))


def uncertain(random):
    """The H100 machine with each constant of GPU and links off by up to SPREAD, independently."""

    def off(what, *names):
        return replace(what, **{name: getattr(what, name) * random.uniform(1 - SPREAD, 1 + SPREAD) for name in names})

    links = ("bytes_per_s", "latency_s", "collective_s")
    gpu = off(H100.gpu, "read_bytes_per_s", "launch_s", "kernel_s")
    return replace(H100, gpu=gpu, inside=off(H100.inside, *links), across=off(H100.across, *links))


def ratios(samples=SAMPLES):
    """Ring over the others at 128 GPUs and 5.12M tokens: over seeds alone, and over the machine's constants as well.

    "8 adapters": a ring whose shards cross over all network adapters of a node at once.
    """
    random = np.random.default_rng(0)
    found = []
    for seed in range(samples):
        for how, where in (("seeds", H100), ("seeds and constants", uncertain(random))):
            wide = replace(where, across=replace(where.across, bytes_per_s=8 * where.across.bytes_per_s))
            times = {name: block_s(name, TOKENS[-1], 128, where=where, steps=2, seed=seed) for name in LABELS}
            times["ring, 8 adapters"] = block_s("ring", TOKENS[-1], 128, where=wide, steps=2, seed=seed)
            found.append({"over": how, "seed": seed, **times})
    return found


def asymptotics():
    """Seconds of the exchange alone, no jitter, and how well a + b N/p + c log2 p fits whole steps (Theorem 1)."""
    names, sizes = ("tree", "all_reduce", "two_level", "all_gather"), [8 << i for i in range(8)]  # fits: several nodes
    own_s = simulate(replace(BLOCK, keys=0), H100, 1, "tree").mean_s
    exchange = [
        {"what": name, "gpus": ranks, "seconds": simulate(replace(BLOCK, keys=0), H100, ranks, name).mean_s - own_s}
        for name in names
        for ranks in sizes
    ]
    fits = []
    for name in names:
        grid = [(tokens, ranks) for tokens in TOKENS for ranks in sizes[1:]]
        found_s = np.array([simulate(replace(BLOCK, keys=n / p), H100, p, name).mean_s for n, p in grid])
        terms = np.array([(1, n / p, np.log2(p)) for n, p in grid])
        weights = np.linalg.lstsq(terms / found_s[:, None], np.ones(len(grid)), rcond=None)[0]  # relative residuals
        worst = np.abs(terms @ weights / found_s - 1).max()
        fits.append({"what": name, "a_s": weights[0], "b_s": weights[1], "c_s": weights[2], "worst_residual": worst})
    return exchange, fits


def volumes():
    """Elements that a rank sends for one block, counted by the simulator, beside the paper's formulas (b = 1)."""
    found = []
    for ranks in (2, 8, 128):
        shape = replace(BLOCK, keys=TOKENS[3] / ranks)
        d, heads = shape.heads * shape.head_dim, shape.heads
        for name, itemsize, formula in (
            ("ring", 2, (ranks - 1) * 2 * d * shape.keys),  # eq 10 over its p ranks, for each of p - 1 hops
            ("all_reduce", 4, 2 * (ranks - 1) / ranks * (d + 2 * heads)),  # eq 14
        ):
            sent = simulate(shape, H100, ranks, name).sent_bytes.sum() / ranks / itemsize
            found.append({"what": name, "gpus": ranks, "tokens": TOKENS[3], "elements": sent, "formula": formula})
    return found


def beside(traffic):
    """Records of real ranks' traffic, and: what a formula says is handed over, what that moves, and the simulator's."""
    d, heads, found = BLOCK.heads * BLOCK.head_dim, BLOCK.heads, []
    for row in traffic:
        p, n = row["ranks"], 4 * (d + heads)  # a packed partial
        handed, times = {
            "ring": (2 * d * row["keys"] * 2 * (p - 1), 1),  # eq 11, for each of p - 1 hops
            "all_reduce": (4 * (d + 2 * heads), 2 * (p - 1) / p),  # eq 13, and 12
            "tree": (None, 1),
            "all_gather": (n, p - 1),
        }[row["what"]]
        if handed is None:  # recursive doubling; ranks beyond the largest power of two send once and are sent to once
            core = 1 << (p.bit_length() - 1)
            handed = n * (core * (core.bit_length() - 1) + 2 * (p - core)) / p
        run = simulate(replace(BLOCK, keys=row["keys"]), H100, p, row["what"])
        formulas = {"handed_formula_bytes": handed, "moved_bytes": times * row["handed_bytes"]}
        found.append(row | formulas | {"simulated_bytes": float(run.sent_bytes.sum()) / p})
    return found


def end_to_end():
    """Table 1: prefill and DECODED tokens of Llama 3.1 8B on 8 H100s, the same prefill on both sides, simulated.

    ring_repeated_s: each KV head is sent as often as query heads share it, as the paper's script does. at_peak_s: the
    arithmetic of the prefill alone at the data sheet's rate.
    """
    found = []
    for thousands, (tree_s, ring_s) in PAPER_S.items():
        mesh = estimate_mesh(LLAMA, H100, thousands * K, 1, 1, 8)
        prefill_s = estimate_first_token_s(LLAMA, H100, thousands * K, 1, mesh) - mesh.token_s
        beside_s = sum(mesh.parts_s[part] for part in ("weights", "launches", "host")) / LLAMA.layers
        beside_s -= H100.gpu.launch_s  # the attention's own, which the simulation has
        shape = layer_shape(LLAMA, thousands * K / 8, 1, 1)
        repeated = replace(shape, kv_heads=shape.heads)
        head = 2 * LLAMA.vocabulary * LLAMA.hidden  # of the last token only
        seen = LLAMA.heads * LLAMA.prefill_dims * LLAMA.layers * thousands * K  # 2 x a mean of half the tokens
        at_peak_s = thousands * K * (LLAMA.flops_per_token - head + seen) / 8 / PEAK_FLOPS_PER_S
        row = {"tokens": thousands * K, "paper_tree_s": tree_s, "paper_ring_s": ring_s}
        row |= {"prefill_s": prefill_s, "at_peak_s": at_peak_s}
        for name, its, algorithm in (
            ("ours_s", shape, "fused"), ("algorithm_3_s", shape, "all_reduce"), ("ring_s", shape, "ring"),
            ("ring_repeated_s", repeated, "ring"),
        ):  # fmt: skip
            run = simulate(its, H100, 8, algorithm, steps=DECODED, layers=LLAMA.layers, beside_s=beside_s, **JITTER)
            row[name] = prefill_s + float(run.step_s.sum())
        found.append(row)
    return found


def whole_model():
    """The same as far as measured: on two H200s, from the records of `bench prefill` and `bench steps`."""
    records = [json.loads(line) for path in WHOLE_MODEL for line in path.read_text().splitlines()]
    found = []
    for prefill in records:
        if prefill.get("seconds") and prefill["what"] == "ours":
            for step in records:
                same = all(step.get(name) == prefill[name] for name in ("context_tokens", "ranks", "device"))
                if same and step.get("tpot_s") and step["what"] == "ours compiled":
                    row = {"tokens": prefill["context_tokens"], "gpus": f"{prefill['ranks']} x {prefill['device']}"}
                    row |= {"chunk_tokens": prefill["chunk_tokens"], "prefill_s": prefill["seconds"]}
                    total_s = prefill["seconds"] + DECODED * step["tpot_s"]
                    found.append(row | {"token_s": step["tpot_s"], "seconds": total_s})
    return found


def gpu_peaks():
    """Peaks of memory in records of `bench decode` with one row, where these have them."""
    records = (json.loads(line) for path in sorted(RESULTS.glob("20*.jsonl")) for line in path.read_text().splitlines())
    names = ("what", "ranks", "keys", "heads", "kv_heads", "head_dim", "peak_extra_bytes")
    return [
        {name: record[name] for name in names} | {"gpu": record["gpus"][0]}
        for record in records
        if record.get("peak_extra_bytes") is not None and record["batch"] == 1
        if record["what"] in ("ring", "three_all_reduce", "fused")
    ]


def overlap():
    """Section 6.3: 640,000 tokens over 8 GPUs; a rank reads its keys and values while the next ones come in."""
    shape, (nvlink, adapter) = replace(BLOCK, keys=640_000 / 8), (H100.inside, H100.across)
    read_s = shape.kv_bytes / H100.gpu.read_bytes_per_s
    return {
        "kv_bytes": shape.kv_bytes, "read_s": read_s, "inside_s": shape.kv_bytes / nvlink.bytes_per_s,
        "across_s": shape.kv_bytes / adapter.bytes_per_s, "ratio": H100.gpu.read_bytes_per_s / nvlink.bytes_per_s,
    }  # fmt: skip


def across_hosts():
    """Bytes that left an emulated host in a step, by algorithm, with the largest batch measured."""
    records = list(map(json.loads, EMULATED.read_text().splitlines()))
    largest = max(records, key=lambda record: record["batch"])
    return {name: its["cross_host_bytes"] for name, its in largest["contestants"].items()}
