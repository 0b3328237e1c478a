"""What real processes show of the paper's claims: CPU ranks, gloo. Bytes and calls, peaks of memory, errors.

Bytes and calls are those handed to torch.distributed (tree_attention.testing.record_traffic). Peaks are those of
PyTorch's allocator, each allocation and release in the order in which torch.profiler saw them; what gloo holds is not
in them. Where hosts can be emulated (hosts.py: Linux, root), bytes are read from network devices as well, one rank on
each host.
"""

import json
import os
import sys
import time
from collections import Counter

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from hosts import emulated_hosts, obstacle, run_ranks, sent_bytes
from tree_attention import attend, tree_decode
from tree_attention.bench.peers import SPREAD_PEERS
from tree_attention.energy import attention_from_energy
from tree_attention.partial import merge, stack
from tree_attention.testing import RankPool, oracle, peaked_inputs, record_traffic

HEADS, HEAD_DIM = 16, 128  # the paper's block: hidden 2048
RANKS = (2, 3, 4)
COUNTED_KEYS = 512  # a rank: counts follow the formulas whatever the length
MEMORY_KEYS = 64_000  # a rank: those of the paper's figure 4
EXCHANGES = ("all_reduce", "tree", "all_gather")
WIRE_STEPS = {"ring": 2} | dict.fromkeys(EXCHANGES, 50)
SETTLE_S = 0.1  # for the last acknowledgements


def step_of(what, q, k, v, group):
    """A decode step of these tensors over the ranks, as `tree_decode` or the ring of bench/peers.py does it."""
    if what == "ring":
        return SPREAD_PEERS["ring"].prepare(q, k, v, group, local=attend)
    return lambda: tree_decode(q, k, v, group=group, algorithm=what)


def own_part(group, *, keys, heads=HEADS, dtype=torch.bfloat16):
    q, k, v = peaked_inputs(B=1, S=keys * group.size(), H=heads, H_kv=heads, D=HEAD_DIM, dtype=dtype)
    return q, *(t.split(keys, 1)[group.rank()].contiguous() for t in (k, v))


@torch.no_grad()
def traffic_here(group, what):
    """Calls of a step on this rank, and the bytes that it hands over to be sent."""
    step = step_of(what, *own_part(group, keys=COUNTED_KEYS), group)
    step()
    with record_traffic() as calls:
        step()
    sent = [call for call in calls if call.name != "recv"]
    return dict(Counter(call.name for call in sent)), sum(call.bytes for call in sent)


def traffic(pool):
    """Of each step: the calls of the busiest rank, and the bytes handed over, mean of all ranks."""
    found = []
    for ranks in RANKS:
        for what in ("ring", *EXCHANGES):
            calls, handed = zip(*pool.run(traffic_here, what, ranks=ranks), strict=True)
            busiest = max(calls, key=lambda its: sum(its.values()))
            row = {"what": what, "ranks": ranks, "keys": COUNTED_KEYS, "calls": busiest}
            found.append(row | {"handed_bytes": sum(handed) / ranks})
    return found


def wire():
    """Bytes that left a rank's host in a step, headers and acknowledgements included, mean over ranks; [] if not to be
    had."""
    found = []
    for ranks in RANKS if obstacle() is None else ():
        with emulated_hosts(ranks, delay_s=0, rate_bit_per_s=1e11) as hosts:
            outputs = run_ranks(hosts, [1] * ranks, [sys.executable, __file__])
        by_rank = [json.loads(output.splitlines()[-1]) for output in outputs]
        for what in by_rank[0]:
            mean = sum(its[what] for its in by_rank) / ranks
            found.append({"what": what, "ranks": ranks, "keys": COUNTED_KEYS, "wire_bytes": mean})
    return found


@torch.no_grad()
def wire_here():
    """What each of these ranks does; it prints its own bytes a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, device, found = dist.group.WORLD, os.environ["GLOO_SOCKET_IFNAME"], {}
    for what, steps in WIRE_STEPS.items():
        step = step_of(what, *own_part(group, keys=COUNTED_KEYS), group)
        step()
        counts = []
        for count in (0, steps):  # the first: of what is around the steps
            time.sleep(SETTLE_S)
            before = sent_bytes(device)
            dist.barrier()
            for _ in range(count):
                step()
            dist.barrier()
            time.sleep(SETTLE_S)
            counts.append(sent_bytes(device) - before)
        found[what] = (counts[1] - counts[0]) / steps
    print(json.dumps(found))
    dist.destroy_process_group()


@torch.no_grad()
def peak_here(group, what, heads, keys):
    """Bytes that preparing and taking a step holds at most on this rank, beyond q, k and v; and those of k and v."""
    q = torch.randn(1, 1, heads, HEAD_DIM).bfloat16()
    k, v = (torch.empty(1, keys, heads, HEAD_DIM, dtype=torch.bfloat16).normal_() for _ in range(2))
    dist.barrier(group)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = step_of(what, q, k, v, group)
        out = step()
    assert out.isfinite().all()
    results = profiler.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak, k.nbytes + v.nbytes


def memory(pool, keys=MEMORY_KEYS):
    """Peaks on the rank with most: two ranks with hidden sizes 2048 and 4096; four with 2048 and fewer keys."""
    cases = [(2, heads, keys) for heads in (HEADS, 2 * HEADS)] + [(4, HEADS, keys // 8)]
    found = []
    for ranks, heads, its_keys in cases:
        for what in ("ring", "all_reduce", "tree"):
            peak, kv_bytes = max(pool.run(peak_here, what, heads, its_keys, ranks=ranks))
            row = {"what": what, "ranks": ranks, "keys": its_keys, "hidden": heads * HEAD_DIM}
            found.append(row | {"extra_bytes": peak, "kv_bytes": kv_bytes})
    return found


@torch.no_grad()
def outputs_here(group, dtype):
    tensors = own_part(group, keys=COUNTED_KEYS, dtype=dtype)
    return {what: step_of(what, *tensors, group)() for what in ("ring", *EXCHANGES)}


def errors(pool):
    """Largest error against float64 of outputs on 4 ranks, float32 and bfloat16; of one process's own, for measure."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        by_rank = pool.run(outputs_here, dtype, ranks=4)
        q, k, v = peaked_inputs(B=1, S=4 * COUNTED_KEYS, H=HEADS, H_kv=HEADS, D=HEAD_DIM, dtype=dtype)
        exact = oracle(q, k, v).out
        alone = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        outs = {"one process": [alone.transpose(1, 2)]} | {what: [its[what] for its in by_rank] for what in by_rank[0]}
        for what, its in outs.items():
            worst = max(float((out.double() - exact).abs().max()) for out in its)
            same = all(torch.equal(out, its[0]) for out in its)
            row = {"what": what, "dtype": str(dtype).removeprefix("torch."), "error": worst, "same_bits": same}
            found.append(row | {"rounding": torch.finfo(dtype).eps * float(exact.abs().max())})
    return found


def algebra():
    """Errors in float64: of the energy's gradient as attention; of partials merged by trees of random shapes."""
    q, k, v = peaked_inputs(B=1, S=256, H=4, H_kv=2, D=32, dtype=torch.float64)
    whole = oracle(q, k, v)
    gradient, _ = attention_from_energy(q, k, v)
    random, by_trees = torch.Generator().manual_seed(0), 0.0
    for _ in range(20):
        parts = [attend(q, *its, backend="reference") for its in zip(k.split(16, 1), v.split(16, 1), strict=True)]
        while len(parts) > 1:
            first, second = (parts.pop(int(torch.randint(len(parts), (), generator=random))) for _ in range(2))
            parts.append(merge(stack([first, second])))
        by_trees = max(by_trees, float((parts[0].out - whole.out).abs().max()))
    return {"energy_error": float((gradient - whole.out).abs().max()), "tree_error": by_trees}


def measure(keys=MEMORY_KEYS):
    """All of it, by section."""
    pool = RankPool(max(RANKS))
    try:
        rows = {"traffic": traffic(pool), "memory": memory(pool, keys), "error": errors(pool)}
    finally:
        pool.close()
    return rows | {"algebra": [algebra()], "wire": wire()}


if __name__ == "__main__":
    wire_here()
