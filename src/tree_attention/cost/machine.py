"""The constants of a machine that the time of a decode step depends on: presets with their sources, or measured ones.

`tree-attention calibrate` writes a file of measured constants, and `plan --machine` reads it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class GpuSpec:
    """Constants of one GPU.

    memory_bytes: its whole memory. read_bytes_per_s: bandwidth of a kernel that streams long reads. matmul_flops_per_s:
    dense 16-bit rate reached in prefill. launch_s: fixed cost of a streaming kernel in a CUDA graph (launch, ramp-up,
    tail). kernel_s: fixed cost of a tiny kernel in a CUDA graph. source: where the numbers come from.
    """

    name: str
    memory_bytes: float
    read_bytes_per_s: float
    matmul_flops_per_s: float
    launch_s: float
    kernel_s: float
    source: str


@dataclass(frozen=True)
class LinkSpec:
    """Constants of a link between GPUs.

    bytes_per_s: one direction, from one GPU to all its peers together. latency_s: from a small write on one GPU until
    the other GPU sees it. collective_s: fixed cost of a small NCCL collective in a CUDA graph. peer_access: True if our
    kernels can write into the other GPU's memory, as `symmetric` and `fused` do.
    """

    name: str
    bytes_per_s: float
    latency_s: float
    collective_s: float
    source: str
    peer_access: bool = True


@dataclass(frozen=True)
class Machine:
    """Nodes of `per_node` GPUs. `inside` is the link within a node, `across` the link between nodes."""

    name: str
    gpu: GpuSpec
    inside: LinkSpec
    across: LinkSpec
    per_node: int


@dataclass(frozen=True)
class Calibration:
    """Measured constants. hardware: the machine they were measured on. date: ISO 8601."""

    machine: Machine
    hardware: str
    date: str


def preset_machine(name: str, **changes: Any) -> Machine:
    """Return the preset machine `name` with the changes that `override` takes. Raises ValueError if it is unknown."""
    return override(_preset(MACHINES, name, "GPU"), **changes)


def override(
    machine: Machine, *, per_node: int | None = None, inside: str | None = None, across: str | None = None
) -> Machine:
    """Return `machine` with another number of GPUs per node and other preset links, each if given.

    Raises ValueError for an unknown link or per_node below 1.
    """
    if per_node is not None and per_node < 1:
        raise ValueError(f"per-node must be at least 1, got {per_node}")
    links = {"inside": inside, "across": across}
    changes: dict[str, Any] = {side: _preset(LINKS, name, "link") for side, name in links.items() if name is not None}
    return replace(machine, per_node=machine.per_node if per_node is None else per_node, **changes)


def _preset(presets: Mapping[str, Spec], name: str, kind: str) -> Spec:
    key = name.lower().replace(" ", "-")
    if key not in presets:
        raise ValueError(f"{kind} must be one of {', '.join(presets)}, got {name!r}")
    return presets[key]


# "measured": benchmarks/results/2026-11-2*_2xH*.jsonl. Otherwise: the data sheet's number x an assumed share.
GPUS = {gpu.name: gpu for gpu in (
    GpuSpec("h100", 80e9, 3.13e12, 539e12, 7.5e-6, 3e-6,
        "H100 SXM 80 GB. read: measured, 0.93 of 3.35 TB/s; launch: measured, 7.2 us (ours) to 8.5 (cuDNN) over the "
        "read at 16k keys; kernel: measured, pack and merge around one all-gather, 14 us in 5 kernels; matmul: as on "
        "the H200"),
    GpuSpec("h200", 141e9, 4.57e12, 539e12, 8e-6, 3e-6,
        "H200 SXM 141 GB. read: measured, 0.95 of 4.8 TB/s; launch: measured, 8 us over the read at 16k keys; kernel: "
        "as on the H100; matmul: measured, prefill of 128k tokens, one GPU, 0.55 of 989 TFLOP/s"),
    GpuSpec("b200", 180e9, 0.93 * 8.0e12, 0.6 * 2250e12, 8e-6, 3e-6,
        "HGX B200 180 GB. Not measured. read: data sheet 8 TB/s x the H100's 0.93; launch, kernel: as on the H100; "
        "matmul: data sheet 2250 TFLOP/s x 0.6 assumed"),
    GpuSpec("mi300x", 192e9, 0.8 * 5.3e12, 0.4 * 1307e12, 10e-6, 4e-6,
        "MI300X 192 GB. Not measured. read: data sheet 5.3 TB/s x 0.8 assumed; launch, kernel: assumed; matmul: data "
        "sheet 1307 TFLOP/s x 0.4 assumed"),
    GpuSpec("a100", 80e9, 0.9 * 2.039e12, 0.7 * 312e12, 8e-6, 3e-6,
        "A100 SXM 80 GB. Not measured. read: data sheet 2.039 TB/s x 0.9 assumed; launch, kernel: as on the H100; "
        "matmul: data sheet 312 TFLOP/s x 0.7 assumed"),
    GpuSpec("rtx4090", 24e9, 0.92 * 1.008e12, 0.8 * 165e12, 6e-6, 3e-6,
        "RTX 4090 24 GB. Not measured. read: data sheet 1.008 TB/s x 0.92 assumed; launch, kernel: assumed; matmul: "
        "data sheet 165 TFLOP/s (float32 sums) x 0.8 assumed"),
)}  # fmt: skip

LINKS = {link.name: link for link in (
    LinkSpec("nvlink3", 0.71 * 300e9, 1.5e-6, 11e-6,
        "data sheet 300 GB/s x NVLink 4's share; latency, collective: as on NVLink 4"),
    LinkSpec("nvlink4", 321e9, 1.5e-6, 11e-6,
        "rate: measured, NCCL sending 4.3 GB in both directions, of 450 GB/s; latency: measured, our exchange kernel "
        "less a small kernel; collective: measured, an NCCL all-gather of 16 KB; all over two GPUs"),
    LinkSpec("nvlink5", 0.71 * 900e9, 1.5e-6, 11e-6,
        "data sheet 900 GB/s x NVLink 4's share; latency, collective: as on NVLink 4"),
    LinkSpec("infinity-fabric", 0.7 * 448e9, 3e-6, 20e-6,
        "MI300X: data sheet 7 x 64 GB/s, x 0.7 assumed; latency, collective: assumed; our kernels run on NVIDIA GPUs "
        "only, so no kernel writes into peer memory", peer_access=False),
    LinkSpec("pcie4", 0.8 * 32e9, 10e-6, 25e-6,
        "x16: 32 GB/s x 0.8 assumed; latency through host memory, as consumer GPUs have no peer access, and "
        "collective: assumed", peer_access=False),
    LinkSpec("pcie5", 0.8 * 64e9, 5e-6, 20e-6, "x16: 64 GB/s x 0.8 assumed; latency, collective: assumed"),
    LinkSpec("infiniband-400g", 0.9 * 50e9, 6e-6, 33e-6,
        "one adapter per GPU: 50 GB/s x 0.9 assumed; latency: assumed; collective: NCCL sending between two hosts, 32 "
        "to 35 us as published (arXiv 2411.01783)"),
    LinkSpec("infiniband-200g", 0.9 * 25e9, 6e-6, 33e-6,
        "one adapter per GPU: 25 GB/s x 0.9 assumed; latency, collective: as with 400G"),
    LinkSpec("ethernet-100g", 0.9 * 12.5e9, 25e-6, 80e-6,
        "one adapter per GPU: 12.5 GB/s x 0.9 assumed; latency, collective: over TCP, assumed"),
)}  # fmt: skip

INSIDE = {"h100": "nvlink4", "h200": "nvlink4", "b200": "nvlink5", "mi300x": "infinity-fabric"}
MACHINES = {name: Machine(name, GPUS[name], LINKS[link], LINKS["infiniband-400g"], 8) for name, link in INSIDE.items()}
MACHINES["a100"] = Machine("a100", GPUS["a100"], LINKS["nvlink3"], LINKS["infiniband-200g"], 8)
MACHINES["rtx4090"] = Machine("rtx4090", GPUS["rtx4090"], LINKS["pcie4"], LINKS["ethernet-100g"], 2)


def save_calibration(calibration: Calibration, file: Path) -> None:
    """Write `calibration` to `file` as JSON."""
    file.write_text(json.dumps(asdict(calibration), indent=2) + "\n", encoding="utf-8")


def load_calibration(file: Path) -> Calibration:
    """Read a file that `save_calibration` wrote.

    Raises ValueError if the file cannot be read, a field is missing or unknown, or a number is not positive.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"machine {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"machine {file} must be a JSON document: {error}") from None
    try:
        about = _fields(Calibration, document)
        parts = _fields(Machine, about["machine"])
        per_node = parts["per_node"]
        if not isinstance(per_node, int) or per_node < 1:
            raise ValueError(f"per_node must be at least 1, got {per_node!r}")
        inside, across = (_part(LinkSpec, parts[name]) for name in ("inside", "across"))
        machine = Machine(str(parts["name"]), _part(GpuSpec, parts["gpu"]), inside, across, per_node)
    except ValueError as error:
        raise ValueError(
            f"machine {file} is not a calibration: {error}. Create one with: tree-attention calibrate"
        ) from None
    return Calibration(machine, str(about["hardware"]), str(about["date"]))


def _part(kind: type[Spec], document: Any) -> Spec:
    """Return a GpuSpec or LinkSpec after checking that its numbers are positive."""
    parts = _fields(kind, document)
    for name, value in parts.items():
        if name == "peer_access":
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        elif name not in ("name", "source"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
    return kind(**parts)


def _fields(kind: type, document: Any) -> dict[str, Any]:
    wanted = [field.name for field in fields(kind)]
    if not isinstance(document, dict) or sorted(document) != sorted(wanted):
        there = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{kind.__name__} must have {', '.join(wanted)}, got {there}")
    return document
