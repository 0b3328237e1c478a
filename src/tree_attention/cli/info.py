"""`tree-attention info`: versions, devices and links, and the route that "auto" takes for a shape."""

import json
import platform
import sys
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import InputError
from ..local import BACKENDS
from ..reduce import ALGORITHMS, AssumedRanks, SharedMemoryLink, SymmetricLink, TwoLevel, link_obstacle, received_bytes
from ..route import explain
from . import environment
from .options import InfoOptions


def info(options: InfoOptions) -> int:
    """Print all sections. Returns the exit code."""
    known = describe(options)
    if options.as_json:
        sys.stdout.write(json.dumps(known) + "\n")
        return 0
    console = Console()
    for title, rows in known.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(f"[bold]{name}", _route_text(name, value) if isinstance(value, dict) else str(value))
        console.print(table, "")
    return 0


def describe(options: InfoOptions) -> dict[str, dict[str, Any]]:
    """Return the sections: title -> name -> value. In "routes", a value is a dict or why the link is unavailable."""
    ranks, device = options.nproc, "cuda" if torch.cuda.is_available() else "cpu"
    q, k, mask = _example(options, device)
    groups = {"process group": AssumedRanks(ranks)}
    groups |= {link.__name__: AssumedRanks(ranks, link) for link in (SharedMemoryLink, SymmetricLink)}
    nodes = (ranks - ranks // 2, ranks // 2) if ranks > 1 else ()
    if nodes:
        groups["TwoLevel, two nodes"] = AssumedRanks(ranks, TwoLevel, nodes)
    fields = ("backend", "algorithm", "is_fused", "received_bytes", "backend_obstacles", "algorithm_obstacles")
    routes: dict[str, Any] = {}
    for name, group in groups.items():
        routes[name] = _unavailable(name, options, device)
        if routes[name] is None:
            route = explain(q, k, k, mask=mask, group=group)
            routes[name] = {field: getattr(route, field) for field in fields}
    sizes: dict[str, Any] = {"rows": options.batch * options.tokens * options.heads, "head_dim": options.head_dim}
    sizes |= {"world_size": ranks, "node_sizes": nodes}
    received = {name: f"{received_bytes(name, **sizes) / 1e3:.1f} kB per rank and layer" for name in ALGORITHMS}
    obstacles = routes["process group"]["backend_obstacles"]
    backends = {name: obstacles.get(name, "available") for name in BACKENDS}
    step = (
        f"B {options.batch}, T {options.tokens}, {options.heads} / {options.kv_heads} heads x {options.head_dim}, "
        f"{options.keys} keys per rank, {options.dtype}, {ranks} ranks" + (", masked" if options.masked else "")
    )
    versions = {"python": platform.python_version()}
    versions |= environment.package_versions("tree-attention", "torch", "transformers", "triton")
    if torch.cuda.is_available():
        versions |= {"cuda": str(torch.version.cuda), "nccl": environment.nccl_version()}
    about = {"versions": versions, "devices": _devices(), "links": _links(), "shape": {"step": step}}
    return about | {"backends": backends, "algorithms": received, "routes": routes}


def _example(options: InfoOptions, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and mask of the shape, expanded from one element: they take no memory."""
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype must be a torch dtype such as bfloat16, got {options.dtype!r}")
    sizes = (options.nproc, options.batch, options.tokens, options.heads, options.kv_heads, options.head_dim)
    if min(sizes) < 1 or options.keys < 0 or options.heads % options.kv_heads:
        needs = "nproc, batch, tokens, heads, kv-heads and head-dim must be at least 1, keys at least 0"
        got = f"{', '.join(map(str, sizes))} and {options.keys} keys"
        raise InputError(f"{needs}, heads a multiple of kv-heads, got {got}")
    one = torch.empty(1, dtype=dtype, device=device)
    q = one.expand(options.batch, options.tokens, options.heads, options.head_dim)
    k = one.expand(options.batch, options.keys, options.kv_heads, options.head_dim)
    mask = torch.empty(1, dtype=torch.bool, device=device).expand(options.batch, 1, options.tokens, options.keys)
    return q, k, mask if options.masked else None


def _unavailable(group: str, options: InfoOptions, device: str) -> str | None:
    obstacle = None
    if group == "SharedMemoryLink" and device == "cuda":
        obstacle = "links CPU ranks, and this machine has CUDA devices"
    if group == "SymmetricLink":
        obstacle = link_obstacle()
        if obstacle is None and torch.cuda.device_count() < options.nproc:
            obstacle = f"needs a GPU of this host per rank, found {torch.cuda.device_count()} for {options.nproc} ranks"
    return obstacle and f"unavailable: {obstacle}"


def _route_text(group: str, route: dict[str, Any]) -> str:
    launches = "one launch" if route["is_fused"] else "exchange after the backend"
    kilobytes = route["received_bytes"] / 1e3
    text = f"{route['backend']}, {route['algorithm']}: {launches}, {kilobytes:.1f} kB per rank and layer"
    obstacle = route["algorithm_obstacles"].get("fused") if group == "SymmetricLink" else None
    return text if obstacle is None else f"{text}\nnot fused: {obstacle}"


def _devices() -> dict[str, str]:
    found = {"cpu": f"{environment.cpu_name()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def _links() -> dict[str, str]:
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    found = {"process groups": ", ".join(name for name, is_available in backends.items() if is_available)}
    for (a, b), has_access in environment.peer_access(torch.cuda.device_count()).items():
        found[f"cuda:{a} - cuda:{b}"] = "peer access" if has_access else "no peer access"
    return found
