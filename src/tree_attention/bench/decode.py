"""Checks and times one decode step over GPUs: ours, other kernels and exchanges, and a streaming read as the ceiling.

Every contestant's output is compared with a float64 reference before it is timed and again after. All contestants take
turns. There are several sets of K and V, used in rotation, so that no cache holds them from one call to the next.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial as bind
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..decode import tree_decode
from ..group import first_fault, gather_values
from ..local import attend
from ..partial import merge
from ..reduce import SymmetricLink
from ..reduce.collectives import gather, pack, unpack
from .case import ROTATED_BYTES, Case, Pair, exact_attention, keys_and_values, make_inputs
from .peers import LOCAL_PEERS, SPREAD_PEERS, Step, streaming_read
from .timing import CapturedCalls, capture, median_seconds, one_line, restart_peak, waiting_seconds

MAX_ERROR = 1e-2
READS = ((65536, 2, 8), (16384, 4, 4), (32768, 8, 4))  # block_bytes, programs_per_sm, num_warps
OWN_KEYS = ("alone", "local")  # kinds that attend to this rank's keys only
Record = dict[str, Any]


@dataclass(frozen=True)
class Communicators:
    """Links and groups that all cases share. alone: a link over this rank only. groups: one per spread peer."""

    world: ProcessGroup
    link: SymmetricLink
    alone: SymmetricLink
    groups: dict[str, ProcessGroup]


@dataclass(frozen=True)
class Contestant:
    """An implementation that takes part: `prepare(k, v)` returns its step, unless `obstacle` says why it cannot run.

    kind: "ours", "alone" (ours without the exchange), "local" or "spread" (peers), or "exchange" (without attention).
    output: extracts the attention from a step's result. Default: the result itself.
    """

    what: str
    kind: str
    prepare: Callable[[Tensor, Tensor], Step]
    output: Callable[[Tensor], Tensor] | None = None
    obstacle: str | None = None


def open_communicators(cases: Sequence[Case]) -> Communicators:
    """Make the links, large enough for all cases, and the groups. Every rank calls it."""
    world: Any = dist.group.WORLD
    everyone = list(range(world.size()))
    rows, head_dim = max(case.batch * case.heads for case in cases), max(case.head_dim for case in cases)
    solos: list[Any] = [dist.new_group([rank]) for rank in everyone]
    groups: dict[str, Any] = {name: dist.new_group(everyone) for name in SPREAD_PEERS}
    link, alone = (SymmetricLink(group, rows=rows, head_dim=head_dim) for group in (world, solos[world.rank()]))
    return Communicators(world, link, alone, groups)


@torch.no_grad()
def measure_decode(
    cases: Sequence[Case], ranks: Communicators, *, peers: Sequence[str], rounds: int, eager: bool
) -> Iterator[list[Record]]:
    """Yield one record per contestant for each case, the same on every rank; the cases with the most bytes come first.

    peers: names of `LOCAL_PEERS` and `SPREAD_PEERS`. Times are seconds per call: graph_s in a CUDA graph, eager_s call
    by call, read_s for a streaming read of the same bytes. waiting_s: see `waiting_seconds`, without an exchange.
    roofline_s: the bytes at the rate of the fastest streaming read so far. peak_extra_bytes: the peak of PyTorch's
    allocator while the first step is prepared and called, less the memory allocated before, on the rank with the most.
    """
    fastest = 0.0
    for case in sorted(cases, key=Case.read_bytes, reverse=True):
        records = _measure_case(case, ranks, peers, rounds, eager)
        fastest = max(fastest, records[0]["streaming_bytes_per_s"])
        yield [record | {"roofline_s": record["bytes"] / fastest} for record in records]
        torch.cuda.empty_cache()


def _measure_case(case: Case, ranks: Communicators, peers: Sequence[str], rounds: int, eager: bool) -> list[Record]:
    world = ranks.world
    q, lengths, sets = make_inputs(case, world.rank(), world.size(), ranks.link.device)
    pairs = [keys_and_values(case, kv) for kv in sets]
    exact = exact_attention(q, *pairs[0], lengths, world)
    entered = {each.what: each for each in contestants(q, lengths, pairs[0], ranks, peers)}
    works, captured, records = {}, {}, {}
    for what, contestant in entered.items():
        steps, records[what] = _try(contestant, pairs, exact, ranks)
        if not steps:
            continue
        calls = [steps[i % len(steps)] for i in range(case.calls())]
        graph = capture(calls)
        if isinstance(graph, CapturedCalls):
            captured[what] = works[what, "graph_s"] = graph
        else:
            records[what]["note"] = graph
        if eager or isinstance(graph, str):
            works[what, "eager_s"] = bind(_call_all, calls)
    read = _streaming_read(case, sets, rounds)
    taken = median_seconds(works, rounds)
    waiting_s = waiting_seconds(captured["fused_alone"].calls, rounds) if "fused_alone" in captured else None
    for what, graph in captured.items():  # check the result in the graph, after all replays
        again = _verdict(entered[what], graph.first, exact, world)
        records[what] |= again if again["wrong"] else {}
    ranks.link.check()
    beyond_caches = len(sets) * case.read_bytes() >= ROTATED_BYTES
    about = asdict(case) | {"ranks": world.size(), "bytes": case.read_bytes(), "beyond_caches": beyond_caches}
    about |= {"sets": len(sets), "calls": case.calls(), "rounds": rounds, "waiting_s": waiting_s} | read
    for what, record in records.items():
        for clock in ("graph_s", "eager_s"):
            taken_s = None if record["wrong"] else taken.get((what, clock))
            record[clock] = taken_s and taken_s / case.calls()
    return [about | {"what": what, "kind": entered[what].kind} | record for what, record in records.items()]


def contestants(
    q: Tensor, lengths: Tensor | None, first: Pair, ranks: Communicators, peers: Sequence[str]
) -> Iterator[Contestant]:
    """Yield ours and, unless there are lengths, which peers do not support, the exchange alone and the peers.

    first: the k and v for which the peers are asked for obstacles. Spread peers come last: their capture may fail.
    """
    link, alone, world = ranks.link, ranks.alone, ranks.world
    decode, local = bind(tree_decode, local_seqlens=lengths), bind(attend, local_seqlens=lengths)
    yield Contestant("fused", "ours", lambda k, v: bind(decode, q, k, v, group=link, algorithm="fused"))
    yield Contestant("apart", "ours", lambda k, v: bind(decode, q, k, v, group=link, algorithm="symmetric"))
    yield Contestant("fused_alone", "alone", lambda k, v: bind(decode, q, k, v, group=alone, algorithm="fused"))
    yield Contestant("attend", "alone", lambda k, v: lambda: local(q, k, v, backend="triton").out)
    if lengths is not None:
        return
    yield Contestant("merge", "exchange", lambda k, v: bind(lambda part: link.reduce(part).out, local(q, k, v)))

    def all_gather(k: Tensor, v: Tensor) -> Step:
        return bind(gather, pack(local(q, k, v)), world)

    yield Contestant("nccl_all_gather", "exchange", all_gather, lambda gathered: merge(unpack(gathered)).out)
    for name, peer in (LOCAL_PEERS | SPREAD_PEERS).items():
        if name in peers:
            kind = "local" if name in LOCAL_PEERS else "spread"
            prepare = bind(peer.prepare, q, group=ranks.groups.get(name))
            yield Contestant(name, kind, prepare, obstacle=peer.obstacle(q, *first))


def _try(contestant: Contestant, pairs: Sequence[Pair], exact: Pair, ranks: Communicators) -> tuple[list[Step], Record]:
    """Return a step per k and v, none if it cannot run or is wrong; and the verdict, the same on every rank."""
    fault, steps, outs, extra = contestant.obstacle, [], [], None
    if fault is None:
        try:
            allocated = restart_peak(pairs[0][0].device)
            for k, v in pairs:
                steps.append(contestant.prepare(k, v))
                outs.append(steps[-1]())
                if extra is None and allocated is not None:  # of the first step only
                    extra = torch.cuda.max_memory_allocated() - allocated
            ranks.link.synchronize()
        except (RuntimeError, ImportError, OSError) as error:  # external kernels and their compilers
            fault = f"did not run: {one_line(error)}"
    fault = first_fault(fault, ranks.world)
    if fault is not None:
        unknown = dict.fromkeys(("peak_extra_bytes", "relative_error", "same_bits"))
        return [], unknown | {"wrong": False, "note": fault}
    extras = [count for count in gather_values(extra, ranks.world) if count is not None]
    verdict = _verdict(contestant, outs[0], exact, ranks.world)
    return [] if verdict["wrong"] else steps, {"peak_extra_bytes": max(extras, default=None)} | verdict


def _verdict(contestant: Contestant, result: Tensor, exact: Pair, world: ProcessGroup) -> Record:
    """Compare with the exact attention: the largest relative error of a rank and, for ours, whether all bits agree."""
    out = result if contestant.output is None else contestant.output(result)
    right = exact[0] if contestant.kind in OWN_KEYS else exact[1]
    worst = ((out - right).norm() / right.norm()).nan_to_num(nan=math.inf, posinf=math.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX, world)
    error, same_bits, note = float(worst), None, None
    if contestant.kind == "ours":
        outs = gather(out, world)
        same_bits = bool((outs == outs[0]).all())
        note = None if same_bits else "wrong: not the same bits on every rank"
    if error > MAX_ERROR:
        note = f"wrong: relative error {error:.1e}"
    finite = error if math.isfinite(error) else None  # JSON has no infinity
    return {"relative_error": finite, "same_bits": same_bits, "wrong": note is not None, "note": note}


def _streaming_read(case: Case, sets: Sequence[Tensor], rounds: int) -> Record:
    """Time a streaming read of the same number of bytes, with the fastest of the settings in READS."""
    words, works = case.read_bytes() // sets[0].itemsize, {}
    for setting in READS:
        steps = [streaming_read(kv.view(-1)[:words], *setting) for kv in sets]
        _call_all(steps)
        works[setting] = capture([steps[i % len(steps)] for i in range(case.calls())])
        assert isinstance(works[setting], CapturedCalls), works[setting]
    taken = median_seconds(works, rounds)
    setting = min(READS, key=taken.__getitem__)
    read_s = taken[setting] / case.calls()
    return {"read_s": read_s, "read_setting": setting, "streaming_bytes_per_s": case.read_bytes() / read_s}


def _call_all(calls: Sequence[Step]) -> None:
    for call in calls:
        call()
