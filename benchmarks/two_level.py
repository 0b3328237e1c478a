"""Compares two-level with flat reductions between distant hosts: emulated (hosts.py), or real under torchrun.

    python benchmarks/two_level.py [--ranks 4,4] [--delay-ms 1] [--mbit-per-s 100]
    torchrun --nnodes 2 ... benchmarks/two_level.py     # on real hosts: CPU and gloo; bytes are not counted

Contestants take turns. The time of a step is from the last rank's start to the last rank's end; on real hosts, whose
clocks differ, the slowest rank's own time. Bytes are counters of the hosts' network devices, including headers and
acknowledgements. Every result is compared with a float64 merge, and across ranks. The last line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from hosts import emulated_hosts, obstacle, run_ranks, sent_bytes
from tree_attention import Partial, SharedMemoryLink, TwoLevel, merge, tree_reduce
from tree_attention.partial import stack
from tree_attention.reduce import level_bytes, received_bytes

FLAT = ("all_gather", "tree", "all_reduce")
COUNTED_STEPS = 5
SETTLE_S = 0.05  # until the last acknowledgements are sent


def partial_of(rank: int, shape: tuple[int, int, int, int]) -> Partial:
    generator = torch.Generator().manual_seed(rank)
    return Partial(torch.randn(shape, generator=generator), 5 * torch.randn(shape[:-1], generator=generator))


def on_rank(options: argparse.Namespace) -> None:
    """Run on each rank; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    shape = (options.batch, 1, options.heads, options.head_dim)
    mine = partial_of(rank, shape)
    topology = TwoLevel()  # nodes by host name
    inside = TwoLevel(link=SharedMemoryLink(dist.new_subgroups_by_enumeration(topology.nodes)[0]))
    calls: dict[str, Callable[[], Partial]] = {
        **{name: lambda name=name: tree_reduce(mine, algorithm=name) for name in FLAT},
        "two_level": lambda: tree_reduce(mine, topology),
        "two_level, shared memory inside": lambda: tree_reduce(mine, inside),
    }
    exact = merge(stack([Partial(*(x.double() for x in partial_of(r, shape))) for r in range(size)]))
    found = {name: _compare(call, exact) for name, call in calls.items()}
    step_s = {name: [] for name in calls}
    for turn in range(options.steps + options.warm_up):
        for name, call in calls.items():
            taken_s = _step_seconds(call, one_clock=options.device is not None)
            if turn >= options.warm_up:
                step_s[name].append(taken_s)
    sent = {name: None if options.device is None else _sent_bytes(call, options.device) for name, call in calls.items()}
    if rank == 0:
        _report(options, topology, found, step_s, sent)
    dist.destroy_process_group()


def _compare(call: Callable[[], Partial], exact: Partial) -> dict[str, float | bool]:
    """Return the largest error of any rank, and whether all ranks have the same bits."""
    result = call()
    everywhere = [torch.empty_like(result.out) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, result.out)
    return {
        "max_error": max(float((out.double() - exact.out).abs().max()) for out in everywhere),
        "same_bits": all(torch.equal(out, everywhere[0]) for out in everywhere),
    }


def _step_seconds(call: Callable[[], Partial], *, one_clock: bool) -> float:
    dist.barrier()
    start_s = time.monotonic()
    call()
    end_s = time.monotonic()
    times = [torch.empty(2, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(times, torch.tensor([start_s, end_s], dtype=torch.float64))
    starts, ends = torch.stack(times).T
    return float(ends.max() - starts.max()) if one_clock else float((ends - starts).max())


def _sent_bytes(call: Callable[[], Partial], device: str) -> float:
    """Return the bytes per step that left the busiest host."""
    dist.barrier()
    time.sleep(SETTLE_S)
    before = sent_bytes(device)
    dist.barrier()
    for _ in range(COUNTED_STEPS):
        call()
    dist.barrier()
    time.sleep(SETTLE_S)
    sent = torch.tensor((sent_bytes(device) - before) / COUNTED_STEPS)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return float(sent)


def _report(
    options: argparse.Namespace, topology: TwoLevel, found: dict, step_s: dict, sent: dict[str, float | None]
) -> None:
    rows, sizes = options.batch * options.heads, [len(node) for node in topology.nodes]
    how = {"rows": rows, "head_dim": options.head_dim}
    stated = {name: received_bytes(name, **how, world_size=sum(sizes)) for name in FLAT}
    inside, across = level_bytes(**how, node_sizes=sizes)
    crossing = across * topology.slices  # bytes that a host receives from the other hosts
    emulated = options.device is not None
    record = {
        "date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__, "backend": "gloo", "nodes": topology.nodes, "batch": options.batch,
        "heads": options.heads, "head_dim": options.head_dim, "steps": options.steps,
        "network": "emulated: namespaces, packets relayed in user space" if emulated else "real",
        "delay_s": options.delay_ms / 1e3 if emulated else None,
        "rate_bit_per_s": options.mbit_per_s * 1e6 if emulated else None,
        "two_level_inside_bytes_per_rank": inside, "two_level_across_bytes_per_rank": across, "contestants": {},
    }  # fmt: skip
    if emulated:
        floor_s = record["delay_s"] + 8 * crossing / record["rate_bit_per_s"]
        print(f"lower bound of the network, one partial per host: {floor_s * 1e3:.1f} ms ({crossing / 1e3:.0f} kB)")
    for name, times in step_s.items():
        quarters = statistics.quantiles(times, n=4)
        record["contestants"][name] = {
            "median_s": statistics.median(times), "quartiles_s": [quarters[0], quarters[2]],
            "cross_host_bytes": sent[name], "stated_bytes_per_rank": stated.get(name, inside + across), **found[name],
        }  # fmt: skip
    ours = record["contestants"]["two_level"]
    for name, its in record["contestants"].items():
        its["times_two_level"] = its["median_s"] / ours["median_s"]
        bytes_text = "" if sent[name] is None else f", {sent[name] / 1e3:8.0f} kB sent per host"
        print(
            f"{name:32} {its['median_s'] * 1e3:8.1f} ms{bytes_text}, {its['times_two_level']:5.2f} x two_level, "
            f"error {its['max_error']:.1e}, bits {'the same' if its['same_bits'] else 'DIFFER'}"
        )
    print(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="4,4", help="ranks on each emulated host")
    parser.add_argument("--delay-ms", type=float, default=1.0)
    parser.add_argument("--mbit-per-s", type=float, default=100.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--device", help=argparse.SUPPRESS)  # set for the ranks of an emulated host
    options = parser.parse_args()
    if "RANK" in os.environ:
        options.device = options.device and os.environ["GLOO_SOCKET_IFNAME"]
        on_rank(options)
        return
    if (found := obstacle()) is not None:
        sys.exit(f"hosts cannot be emulated here: {found}")
    ranks = [int(word) for word in options.ranks.split(",")]
    network = {"delay_s": options.delay_ms / 1e3, "rate_bit_per_s": options.mbit_per_s * 1e6}
    with emulated_hosts(len(ranks), **network) as hosts:
        command = [sys.executable, __file__, *sys.argv[1:], "--device", "emulated"]
        # silence c10d's warnings: these hosts' addresses have no names
        outputs = run_ranks(hosts, ranks, command, env={"TORCH_CPP_LOG_LEVEL": "ERROR"})
    sys.stdout.write(outputs[0])


if __name__ == "__main__":
    main()
