"""`tree-attention bench decode`: a decode step on GPUs, compared with peers and with the memory bandwidth."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from ..bench.case import MAX_BYTES, Case
from ..bench.decode import measure_decode, open_communicators
from ..bench.peers import LOCAL_PEERS, SPREAD_PEERS
from ..errors import InputError, Unavailable
from . import environment
from .launch import run_on_ranks
from .options import BenchDecodeOptions, parse_numbers
from .plots import draw_records
from .records import Record, print_table, publish

LABELS = {"fused": "ours, fused", "apart": "ours, two launches"}
LABELS |= {"fused_alone": "ours, fused, no exchange", "attend": "ours, attend, no exchange"}
LABELS |= {"merge": "exchange alone: SymmetricLink", "nccl_all_gather": "exchange alone: NCCL all-gather"}
PREFIXES = {"local": "", "spread": "cudnn + "}


def bench_decode(options: BenchDecodeOptions) -> int:
    """Measure on the ranks, print tables and one JSON document. Returns the exit code, 1 if ours is wrong."""
    cases, peers = cases_of(options), peers_of(options)
    if options.nproc < 1 or options.rounds < 1:
        raise InputError(f"nproc and rounds must be at least 1, got {options.nproc} and {options.rounds}")
    found = torch.cuda.device_count()
    if not torch.cuda.is_available() or found < options.nproc:
        raise Unavailable(f"bench decode needs a CUDA device per rank, got {options.nproc} ranks and {found} devices")
    environment.disable_multicast()
    return run_on_ranks(_on_rank, options.nproc, "cuda", cases, peers, options)


def cases_of(options: BenchDecodeOptions) -> list[Case]:
    """Check the sizes. Return each batch size with each number of keys, or with `pairs` the two lists in parallel."""
    keys, batch = parse_numbers("keys", options.keys), parse_numbers("batch", options.batch)
    heads, kv_heads, head_dim = options.heads, options.kv_heads, options.head_dim
    if min(*keys, *batch, heads, kv_heads, head_dim) < 1 or heads % kv_heads:
        raise InputError(
            "keys, batch, heads, kv-heads and head-dim must be at least 1, heads a multiple of kv-heads, "
            f"got {options.keys}, {options.batch}, {heads}, {kv_heads} and {head_dim}"
        )
    if options.layout not in ("NHD", "HND"):
        raise InputError(f"layout must be NHD or HND, got {options.layout!r}")
    if options.pairs and len(batch) != len(keys):
        raise InputError(f"pairs needs as many batch sizes as keys, got {options.batch} and {options.keys}")
    sizes_of = zip(batch, keys, strict=True) if options.pairs else itertools.product(batch, keys)
    cases = [Case(*sizes, heads, kv_heads, head_dim, options.layout, options.ragged) for sizes in sizes_of]
    largest = 2 * max(case.allocated_bytes() for case in cases)
    if largest > MAX_BYTES:
        raise InputError(f"two sets of K and V must take at most {MAX_BYTES / 1e9:g} GB, got {largest / 1e9:.0f} GB")
    return cases


def peers_of(options: BenchDecodeOptions) -> list[str]:
    """Check and return the chosen names of LOCAL_PEERS and SPREAD_PEERS."""
    known = [*LOCAL_PEERS, *SPREAD_PEERS]
    chosen = {"all": known, "none": []}.get(options.peers, options.peers.split(","))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"peers must be all, none or some of {', '.join(known)}, got {', '.join(unknown)!r}")
    return chosen


def _on_rank(cases: list[Case], peers: list[str], options: BenchDecodeOptions, device: torch.device) -> int:
    ranks, about = open_communicators(cases), {}
    if dist.get_rank() == 0:
        about = {"date": environment.date()} | environment.gpu_environment(dist.get_world_size())
        about |= environment.package_versions("torch", "triton", "flashinfer-python", "fa3-fwd")
        about |= {"link_workspace_bytes": ranks.link.workspace_bytes}
    batches = measure_decode(cases, ranks, peers=peers, rounds=options.rounds, eager=options.eager)
    records = publish(batches, _show, about, options.output, "surroundings")
    if options.plot is not None and dist.get_rank() == 0:
        title = f"{options.heads} / {options.kv_heads} heads x {options.head_dim}, bfloat16, {about['gpus'][0]}"
        drawn = [record for record in records if record["batch"] == records[0]["batch"]]
        draw_records(options.plot, drawn, "graph_s", 1e6, title=title, x=("keys", "keys per rank"), y="µs per step")
    return int(any(record["wrong"] for record in records if record["kind"] in ("ours", "alone")))


def _show(records: Sequence[Record]) -> None:
    case, console = records[0], Console(width=120, highlight=False)
    lengths = f"1 to {case['keys']}" if case["ragged"] else str(case["keys"])
    waiting_us = case["waiting_s"] and 1e6 * case["waiting_s"]
    console.print(
        f"[bold]batch {case['batch']}, {lengths} keys per rank, {case['ranks']} ranks[/bold]: {case['heads']} / "
        f"{case['kv_heads']} heads x {case['head_dim']}, bfloat16, {case['layout']}; {case['sets']} sets of K and V"
        + ("" if case["beyond_caches"] else ", which may fit in the cache")
    )
    console.print(
        f"roofline {1e6 * case['roofline_s']:.1f} µs: {case['bytes'] / 1e6:.1f} MB per rank at "
        f"{case['bytes'] / case['roofline_s'] / 1e12:.2f} TB/s, the fastest read so far; "
        f"the same read in this case: {1e6 * case['read_s']:.1f} µs"
    )
    console.print(f"always waiting for the slower rank would cost {_cell(waiting_us, '.1f')} µs per step")
    columns = ("", "graph, µs", "x roofline", "x fastest local peer", "eager, µs", "extra, MB", "relative error")
    print_table(columns, table_rows(records))
    for record in records:
        if record["note"]:
            console.print(f"{record['what']}: {record['note']}", markup=False)
    console.print()


def table_rows(records: Sequence[Record]) -> list[list[str]]:
    """Rows of name, graph µs, x roofline, x fastest local peer, eager µs, extra MB, relative error; "-" if unknown."""
    peers_s = [record["graph_s"] for record in records if record["kind"] == "local" and record["graph_s"]]
    rows = []
    for record in records:
        graph_s, is_attention = record["graph_s"], record["kind"] != "exchange"
        name = LABELS.get(record["what"]) or PREFIXES[record["kind"]] + record["what"]
        cells = (
            _cell(graph_s and 1e6 * graph_s, ".1f"),
            _cell(graph_s and is_attention and graph_s / record["roofline_s"], ".3f"),
            _cell(graph_s and is_attention and peers_s and graph_s / min(peers_s), ".3f"),
            _cell(record["eager_s"] and 1e6 * record["eager_s"], ".1f"),
            _cell(record["peak_extra_bytes"] and record["peak_extra_bytes"] / 1e6, ".1f"),
            _cell(record["relative_error"], ".1e"),
        )
        rows.append([name, *cells])
    return rows


def _cell(value: Any, form: str) -> str:
    """Format a number. Unknown values are None, False or an empty list: "-"."""
    return format(value, form) if isinstance(value, float) else "-"
