"""`tree-attention bench decode`: a decode step on GPUs, its peers and the speed of memory, as tables and records."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ..bench.case import MOST_BYTES, Case
from ..bench.decode import measure, open_communicators
from ..bench.peers import LOCAL_PEERS, SPREAD_PEERS
from ..errors import InputError, Unavailable
from .bench import numbers
from .launch import run_on_ranks
from .options import BenchDecodeOptions

LABELS = {
    "fused": "ours, fused", "apart": "ours, apart", "fused_alone": "ours, fused, no exchange",
    "attend": "ours, attend, no exchange", "merge": "exchange alone: SymmetricLink",
    "nccl_all_gather": "exchange alone: NCCL all-gather",
}  # fmt: skip
WITH = {"local": "", "spread": "cudnn + "}
PLAIN_MEMORY = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def bench_decode(options: BenchDecodeOptions) -> int:
    """Measure on `nproc` ranks, print tables and one JSON document; returns the exit code, 1 if ours is wrong."""
    wanted, peers = cases_of(options), peers_of(options)
    if options.nproc < 1 or options.rounds < 1:
        raise InputError(f"nproc and rounds must be at least 1, got {options.nproc} and {options.rounds}")
    if not torch.cuda.is_available() or torch.cuda.device_count() < options.nproc:
        found = torch.cuda.device_count()
        raise Unavailable(f"bench decode needs a CUDA device for each rank: {options.nproc} ranks, {found} devices")
    os.environ.update(PLAIN_MEMORY)  # inherited by the ranks
    return run_on_ranks(_on_rank, options.nproc, "cuda", wanted, peers, options)


def cases_of(options: BenchDecodeOptions) -> list[Case]:
    """Every batch size with every number of keys; with `pairs` one of each."""
    keys, batch = numbers("keys", options.keys), numbers("batch", options.batch)
    sizes = (*keys, *batch, options.heads, options.kv_heads, options.head_dim)
    if min(sizes) < 1 or options.heads % options.kv_heads:
        raise InputError(
            f"keys, batch, heads, kv-heads and head-dim must be at least 1, heads a multiple of kv-heads, "
            f"got {options.keys}, {options.batch}, {options.heads}, {options.kv_heads} and {options.head_dim}"
        )
    if options.layout not in ("NHD", "HND"):
        raise InputError(f"layout must be NHD or HND, got {options.layout!r}")
    rest = (options.heads, options.kv_heads, options.head_dim, options.layout, options.ragged)
    if options.pairs and len(batch) != len(keys):
        raise InputError(f"pairs needs as many batch sizes as keys, got {options.batch} and {options.keys}")
    sizes_of = zip(batch, keys, strict=True) if options.pairs else itertools.product(batch, keys)
    wanted = [Case(rows, held, *rest) for rows, held in sizes_of]
    largest = 2 * max(case.allocated_bytes() for case in wanted)
    if largest > MOST_BYTES:
        raise InputError(f"two sets of K and V must take at most {MOST_BYTES / 1e9:g} GB, got {largest / 1e9:.0f} GB")
    return wanted


def peers_of(options: BenchDecodeOptions) -> list[str]:
    """Names of LOCAL_PEERS and SPREAD_PEERS."""
    known = [*LOCAL_PEERS, *SPREAD_PEERS]
    chosen = {"all": known, "none": []}.get(options.peers, options.peers.split(","))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"peers must be all, none or some of {', '.join(known)}, got {', '.join(unknown)!r}")
    return chosen


def table_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Name, graph µs, times the roofline, times the fastest local peer, eager µs, relative error; "-" if not known."""
    peers_s = [record["graph_s"] for record in records if record["kind"] == "local" and record["graph_s"]]
    rows = []
    for record in records:
        graph_s, alike = record["graph_s"], record["kind"] != "exchange"
        rows.append([
            LABELS.get(record["what"]) or WITH[record["kind"]] + record["what"],
            _cell(graph_s and 1e6 * graph_s, ".1f"),
            _cell(graph_s and alike and graph_s / record["roofline_s"], ".3f"),
            _cell(graph_s and alike and peers_s and graph_s / min(peers_s), ".3f"),
            _cell(record["eager_s"] and 1e6 * record["eager_s"], ".1f"),
            _cell(record["peak_extra_bytes"] and record["peak_extra_bytes"] / 1e6, ".1f"),
            _cell(record["relative_error"], ".1e"),
        ])  # fmt: skip
    return rows


def _cell(value: Any, form: str) -> str:
    """Of a number; what is not known may be None, False or empty."""
    return format(value, form) if isinstance(value, float) else "-"


def _on_rank(wanted: list[Case], peers: list[str], options: BenchDecodeOptions, device: torch.device) -> int:
    """The first rank prints each case as soon as it is done: a run that is cut short has still said something."""
    ranks = open_communicators(wanted)
    speaks = dist.get_rank() == 0
    surroundings = _surroundings(ranks.workspace_bytes()) if speaks else {}
    records = []
    for of_case in measure(wanted, ranks, peers=peers, rounds=options.rounds, eager=options.eager):
        records += of_case
        if speaks:
            _print(of_case)
        if speaks and options.output is not None:
            with options.output.open("a") as file:
                file.writelines(json.dumps(surroundings | record) + "\n" for record in of_case)
    if speaks:
        sys.stdout.write(json.dumps({"surroundings": surroundings, "records": records}) + "\n")
        sys.stdout.flush()
    return int(any(record["wrong"] for record in records if record["kind"] in ("ours", "alone")))


def _print(records: Sequence[dict[str, Any]]) -> None:
    case, console = records[0], Console(width=120)
    lengths = f"1 to {case['keys']}" if case["ragged"] else str(case["keys"])
    waiting_us = case["waiting_s"] and 1e6 * case["waiting_s"]
    console.print(
        f"[bold]batch {case['batch']}, {lengths} keys a rank, {case['ranks']} ranks[/bold]: {case['heads']} / "
        f"{case['kv_heads']} heads x {case['head_dim']}, bfloat16, {case['layout']}; {case['sets']} sets of K and V"
        + ("" if case["beyond_caches"] else ", which caches may hold"),
        f"roofline {1e6 * case['roofline_s']:.1f} µs: {case['bytes'] / 1e6:.1f} MB a rank at "
        f"{case['bytes'] / case['roofline_s'] / 1e12:.2f} TB/s, the fastest read so far; "
        f"reading as much here: {1e6 * case['read_s']:.1f} µs",
        f"always waiting for the slower rank would cost a step: {_cell(waiting_us, '.1f')} µs",
        sep="\n", highlight=False,
    )  # fmt: skip
    table = Table()
    for name in ("", "graph, µs", "x roofline", "x fastest local peer", "eager, µs", "extra, MB", "relative error"):
        table.add_column(name, justify="right" if name else "left")
    for row in table_rows(records):
        table.add_row(*row)
    console.print(table)
    for record in records:
        if record["note"]:
            console.print(f"{record['what']}: {record['note']}", highlight=False, markup=False)
    console.print()
    sys.stdout.flush()


def _surroundings(workspace_bytes: int) -> dict[str, Any]:
    from torch.cuda import nccl

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(dist.get_world_size())],
        "links": _links(dist.get_world_size()),
        "driver": ", ".join(sorted(set(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()))),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
        **{package: _version(package) for package in ("torch", "triton", "flashinfer-python", "fa3-fwd")},
        "link_workspace_bytes": workspace_bytes,
    }


def _links(count: int) -> str:
    """NV18, say, for 18 NVLinks between two GPUs; or whether there is peer access."""
    lines = [line for line in _nvidia_smi("topo", "-m").splitlines() if re.match(r"(\x1b\[\d*m)*GPU\d+\s", line)]
    found = sorted(set(re.findall(r"\bNV\d+\b", "\n".join(lines))))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    access = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    return ", ".join(found) or ("peer access" if access else "no peer access")


def _nvidia_smi(*arguments: str) -> str:
    command = shutil.which("nvidia-smi")
    return subprocess.run([command, *arguments], capture_output=True, text=True).stdout if command else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
