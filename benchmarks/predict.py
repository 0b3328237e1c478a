"""Compares predicted with measured times of `tree-attention bench decode`, `steps` and `prefill`, as Markdown.

python benchmarks/predict.py benchmarks/results/*_2xH*.jsonl
python benchmarks/predict.py --machine machine.json benchmarks/results/2026-11-25_2xH100*.jsonl

The prediction uses the preset of the GPU that a record names, or one calibration for all records.
"""

import argparse
import json
from pathlib import Path

from tree_attention.cost.decode import AttentionShape, decode_cost
from tree_attention.cost.machine import MACHINES, load_calibration
from tree_attention.cost.mesh import estimate_first_token_s, estimate_mesh
from tree_attention.cost.model import load_model_spec, preset_names

ALGORITHMS = {  # name in a record -> exchange algorithm; None: no exchange, one rank's keys
    "fused": "fused", "apart": "symmetric", "fused_alone": None, "attend": None, "cudnn": None,
    "three_all_reduce": "all_reduce", "all_gather": "all_gather", "ring": "ring",
}  # fmt: skip
OURS = ("fused", "apart", "fused_alone", "attend")


def predict(record, given=None):
    """Return the predicted seconds of a record's step, or None if its GPU has no preset or it is not modelled."""
    machine = given or preset_of(record["gpus"][0])
    if machine is None or record["what"] not in ALGORITHMS:
        return None
    keys = record["bytes"] / (4 * record["batch"] * record["kv_heads"] * record["head_dim"])  # the mean, if ragged
    shape = AttentionShape(record["batch"], record["heads"], record["kv_heads"], record["head_dim"], keys)
    algorithm = ALGORITHMS[record["what"]]
    ranks = 1 if algorithm is None else record["ranks"]
    return decode_cost(shape, machine, ranks, algorithm or "fused").total_s


def predict_token(record, given=None):
    """Return the predicted seconds of our compiled step of a whole model, or None as in `predict`."""
    machine = given or preset_of(record["device"])
    if machine is None or record["model"] not in preset_names() or record["what"] != "ours compiled":
        return None
    tensor = record.get("tensor_parallel", 1)
    sequence = record["ranks"] // tensor
    return estimate_mesh(
        load_model_spec(record["model"]), machine, record["context_tokens"], 1, tensor, sequence
    ).token_s


def predict_prefill(record, given=None):
    """Return the predicted seconds of a whole model's prefill, or None as in `predict`. Stock uses one GPU."""
    machine = given or preset_of(record["device"])
    if machine is None or record["model"] not in preset_names():
        return None
    model, tokens = load_model_spec(record["model"]), record["context_tokens"]
    mesh = estimate_mesh(model, machine, tokens, 1, 1, record["ranks"])
    return estimate_first_token_s(model, machine, tokens, 1, mesh) - mesh.token_s


def preset_of(gpu):
    """Return the preset whose name is part of the GPU's name, or None."""
    return next((machine for name, machine in MACHINES.items() if name in gpu.lower().replace(" ", "")), None)


def read(files, given=None):
    """Return the timed records that can be predicted, with `predicted_s`; of repeated ones, the last."""
    found = {}
    for file in files:
        for line in file.read_text().splitlines():
            record = json.loads(line)
            predicted_s = predict(record, given) if record.get("graph_s") and "kv_heads" in record else None
            if predicted_s is not None:
                key = tuple(record[name] for name in ("batch", "keys", "heads", "kv_heads", "ragged", "what", "ranks"))
                found[file.name, key] = record | {"predicted_s": predicted_s}
    return list(found.values())


def table(records):
    """Yield the lines of a Markdown table."""
    yield "| GPUs | batch x keys per rank | heads | what | measured, us | predicted, us | error |"
    yield "|---|---|---|---|---|---|---|"
    for record in records:
        measured_us, predicted_us = 1e6 * record["graph_s"], 1e6 * record["predicted_s"]
        keys = f"{record['batch']} x " + (f"(1 to {record['keys']})" if record["ragged"] else str(record["keys"]))
        yield (
            f"| {record['ranks']} x {record['gpus'][0]} | {keys} | {record['heads']} / {record['kv_heads']} | "
            f"{record['what']} | {measured_us:.1f} | {predicted_us:.1f} | {predicted_us / measured_us - 1:+.1%} |"
        )


def model_tables(files, given=None):
    """Yield Markdown tables for the records of whole models, steps and prefill; nothing if there are none."""
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for what, unit, scale, measured, predicted in (
        ("per token", "ms", 1e3, "tpot_s", predict_token),
        ("prefill", "s", 1, "seconds", predict_prefill),
    ):
        lines = []
        for record in records:
            predicted_s = predicted(record, given) if record.get(measured) and "device" in record else None
            if predicted_s is not None:
                measured_s = record[measured]
                lines.append(
                    f"| {gpus(record)} x {record['device']} | {record['model']} | {record['context_tokens']} | "
                    f"{record['what']} | {scale * measured_s:.2f} | {scale * predicted_s:.2f} | "
                    f"{predicted_s / measured_s - 1:+.1%} |"
                )
        if lines:
            yield f"\n| GPUs | model | context | what | {what}, {unit} | predicted, {unit} | error |"
            yield "|---|---|---|---|---|---|---|"
            yield from lines


def gpus(record):
    """Number of GPUs, as (tensor x sequence) if the weights are split."""
    tensor = record.get("tensor_parallel", 1)
    return str(record["ranks"]) if tensor == 1 else f"({tensor} x {record['ranks'] // tensor})"


def summary(records):
    """Yield a line per kind with its range of errors."""
    for what in ALGORITHMS:
        errors = [r["predicted_s"] / r["graph_s"] - 1 for r in records if r["what"] == what]
        if errors:
            kind = "ours" if what in OURS else "peer"
            yield f"{what} ({kind}): {len(errors)} cases, errors from {min(errors):+.1%} to {max(errors):+.1%}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files of records, one JSON document per line")
    parser.add_argument("--machine", type=Path, help="file written by `tree-attention calibrate`")
    options = parser.parse_args(arguments)
    given = None if options.machine is None else load_calibration(options.machine).machine
    records = read(options.files, given)
    print(*table(records), "", *summary(records), *model_tables(options.files, given), sep="\n")


if __name__ == "__main__":
    main()
