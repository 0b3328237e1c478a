"""`tree-attention info`: what is here, and what "auto" makes of a shape."""

import json
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..local import BACKENDS
from ..reduce import ALGORITHMS, AssumedRanks, SymmetricLink, level_bytes, link_obstacle, received_bytes
from ..route import explain


@dataclass(frozen=True)
class Shape:
    """A decode step on one of `ranks` ranks."""

    ranks: int
    B: int
    T: int
    H: int
    H_kv: int
    D: int
    S_local: int
    dtype: str
    masked: bool


def info(shape: Shape, as_json: bool) -> int:
    """Print it all; returns the exit code."""
    known = describe(shape)
    if as_json:
        sys.stdout.write(json.dumps(known) + "\n")
        return 0
    console = Console()
    for title, rows in known.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, text in rows.items():
            table.add_row(f"[bold]{name}", str(text))
        console.print(table, "")
    return 0


def describe(shape: Shape) -> dict[str, dict[str, Any]]:
    """Section -> name -> what is known."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, mask = _example(shape, device)
    route = explain(q, k, k, mask=mask, group=AssumedRanks(shape.ranks))
    backends = {name: route.backend_obstacles.get(name, "can run it") for name in BACKENDS}
    rows = shape.B * shape.T * shape.H
    how: dict[str, Any] = {"rows": rows, "head_dim": shape.D, "world_size": shape.ranks}
    received = {name: received_bytes(name, **how) for name in ALGORITHMS if name != "two_level"}
    algorithms = {name: f"{amount / 1e3:.1f} kB a rank and layer" for name, amount in received.items()}
    algorithms["two_level"] = _on_two_nodes(shape.ranks, rows, shape.D)
    described = f"B {shape.B}, T {shape.T}, {shape.H} / {shape.H_kv} heads x {shape.D}, {shape.S_local} keys a rank"
    return {
        "versions": _versions(),
        "devices": _devices(),
        "links": _links(),
        "shape": {"step": f"{described}, {shape.dtype}, {shape.ranks} ranks" + (", masked" if shape.masked else "")},
        "backends for it": backends,
        "algorithms for it": algorithms,
        "auto chooses": {"backend": route.backend, **_algorithms(shape, device, q, k)},
    }


def _on_two_nodes(ranks: int, rows: int, head_dim: int) -> str:
    if ranks < 2:
        return "needs two nodes"
    inside, across = level_bytes(rows=rows, head_dim=head_dim, node_sizes=(ranks - ranks // 2, ranks // 2))
    return f"on two nodes {inside / 1e3:.1f} kB a rank and layer inside a node, {across / 1e3:.1f} kB across"


def _algorithms(shape: Shape, device: str, q: torch.Tensor, k: torch.Tensor) -> dict[str, str]:
    """What "auto" makes of the exchange, without a link and with one, and why."""
    found = {"algorithm": explain(q, k, k, group=AssumedRanks(shape.ranks)).algorithm}
    if device == "cpu":
        found["with a SharedMemoryLink"] = "shared_memory (TreeCache makes the link on one host)"
    rows = shape.B * shape.T * shape.H
    obstacle = link_obstacle()
    if obstacle is None and torch.cuda.device_count() < shape.ranks:
        obstacle = f"needs a GPU of this host for each of {shape.ranks} ranks, found {torch.cuda.device_count()}"
    unfused = explain(q, k, k, group=AssumedRanks(shape.ranks, SymmetricLink)).algorithm_obstacles.get("fused")
    if obstacle is not None:
        found["with a SymmetricLink"] = f"not to be had here: {obstacle}"
    elif unfused is not None:
        found["with a SymmetricLink"] = f"symmetric, apart from the decoding: the fused kernel {unfused}"
    else:
        found["with a SymmetricLink"] = f"fused, if the link has room: rows={rows}, head_dim={shape.D} at least"
    if shape.H % shape.ranks == 0:
        found["for own heads only"] = "ask for fused_scatter or symmetric_scatter with a link, reduce_scatter without"
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("tree-attention", "torch", "transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        from torch.cuda import nccl

        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def _devices() -> dict[str, str]:
    found = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def _links() -> dict[str, str]:
    """Which process-group backends there are, and between which GPUs memory can be read directly."""
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    found = {"process groups": ", ".join(name for name, there in backends.items() if there)}
    count = torch.cuda.device_count()
    for a in range(count):
        for b in range(a + 1, count):
            direct = torch.cuda.can_device_access_peer(a, b)
            found[f"cuda:{a} - cuda:{b}"] = "peer access" if direct else "no peer access"
    return found


def _example(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, k and mask of that shape, without their memory."""
    dtype = getattr(torch, shape.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype must be a torch dtype such as bfloat16, got {shape.dtype!r}")
    if (
        min(shape.ranks, shape.B, shape.T, shape.H, shape.H_kv, shape.D) < 1
        or shape.S_local < 0
        or shape.H % shape.H_kv
    ):
        raise InputError(f"sizes must be at least 1, and heads a multiple of kv-heads, got {shape}")
    one = torch.empty(1, dtype=dtype, device=device)
    q = one.expand(shape.B, shape.T, shape.H, shape.D)
    k = one.expand(shape.B, shape.S_local, shape.H_kv, shape.D)
    mask = torch.empty(1, dtype=torch.bool, device=device).expand(shape.B, 1, shape.T, shape.S_local)
    return q, k, mask if shape.masked else None
