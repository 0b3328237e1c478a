"""Decode steps over GPUs: ours, other people's kernels and exchanges, and the ceiling; first whether they are right.

Every contestant's output is compared with a float64 reference, before it is timed and again after. Then all take turns.
K and V lie in several sets that are used in rotation, so that no cache holds them from one call to the next.
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
from ..group import first_fault, gather_objects
from ..local import attend
from ..partial import merge
from ..reduce import SymmetricLink
from ..reduce.collectives import gather, pack, unpack
from .case import ROTATED_BYTES, Case, keys_and_values, make_inputs, reference
from .peers import LOCAL, SPREAD, Peer, Step, streaming_read
from .timing import Captured, Run, capture, one_line, seconds_in_turns, waiting_seconds

MOST_ERROR = 1e-2
READS = ((65536, 2, 8), (16384, 4, 4), (32768, 8, 4))  # block_bytes, programs_per_sm, num_warps
OWN = ("alone", "local")  # kinds that cover this rank's keys only


@dataclass(frozen=True)
class Ranks:
    """What outlives a case. alone: a link over this rank only. groups: a communicator for each spread peer."""

    world: ProcessGroup
    link: SymmetricLink
    alone: SymmetricLink
    groups: dict[str, ProcessGroup]

    def workspace_bytes(self) -> int:
        """Device memory of the link, on this rank."""
        return self.link.workspace_bytes


@dataclass(frozen=True)
class Contestant:
    """prepare(k, v) -> step, or `obstacle` says why not. output: what of its result is the attention, all by default.

    kind: "ours", "alone" (ours without exchange), "local", "spread" (the peers) or "exchange" (without the attention).
    """

    what: str
    kind: str
    prepare: Callable[[Tensor, Tensor], Step]
    output: Callable[[Tensor], Tensor] | None = None
    obstacle: str | None = None


def meet(cases: Sequence[Case]) -> Ranks:
    """Links and groups with room for all cases; every rank calls it."""
    world: Any = dist.group.WORLD
    everyone = list(range(world.size()))
    rows, head_dim = max(case.batch * case.heads for case in cases), max(case.head_dim for case in cases)
    solos: list[Any] = [dist.new_group([rank]) for rank in everyone]
    groups: dict[str, Any] = {name: dist.new_group(everyone) for name in SPREAD}
    link, alone = (SymmetricLink(group, rows=rows, head_dim=head_dim) for group in (world, solos[world.rank()]))
    return Ranks(world, link, alone, groups)


@torch.no_grad()
def measure(
    cases: Sequence[Case], ranks: Ranks, *, peers: Sequence[str], rounds: int, eager: bool
) -> Iterator[list[dict[str, Any]]]:
    """For each case, those that read most first, a record for each contestant; the same on every rank.

    peers: names of `LOCAL` and `SPREAD`. Times are those of one call: graph_s in a CUDA graph, eager_s called one by
    one, read_s the streaming read of the same bytes, waiting_s what a step of ours would lose to always waiting for the
    slower rank, measured without an exchange. roofline_s: the bytes over the fastest such read so far.
    peak_extra_bytes: the most that PyTorch holds while the first step is prepared and called, beyond what it held
    before, K and V among that; on the rank with most. Not in it: a link's memory, made before, and NCCL's own.
    """
    fastest = 0.0
    for case in sorted(cases, key=Case.read_bytes, reverse=True):
        records = _measure_case(case, ranks, peers, rounds, eager)
        fastest = max(fastest, records[0]["streaming_bytes_per_s"])
        yield [record | {"roofline_s": record["bytes"] / fastest} for record in records]
        torch.cuda.empty_cache()


def _measure_case(case: Case, ranks: Ranks, peers: Sequence[str], rounds: int, eager: bool) -> list[dict[str, Any]]:
    q, lengths, sets = make_inputs(case, ranks.world.rank(), ranks.world.size(), ranks.link.device)
    pairs = [keys_and_values(case, kv) for kv in sets]
    exact = reference(q, *pairs[0], lengths, ranks.world)
    entered = {each.what: each for each in contestants(q, lengths, pairs[0], ranks, peers)}
    runs, captured, records = {}, {}, {}
    for what, contestant in entered.items():
        steps, records[what] = _try(contestant, pairs, exact, ranks)
        if not steps:
            continue
        calls = [steps[i % len(steps)] for i in range(case.calls())]
        graph = capture(calls)
        if isinstance(graph, Captured):
            captured[what], runs[what, "graph_s"] = graph, Run(graph.replay, ahead=True)
        else:
            records[what]["note"] = graph
        if eager or isinstance(graph, str):
            runs[what, "eager_s"] = Run(bind(_call_all, calls), ahead=False)
    read = _streaming_read(case, sets, rounds)
    taken = seconds_in_turns(runs, rounds)
    alone = captured.get("fused_alone")
    waiting_s = None if alone is None else waiting_seconds(alone.calls, rounds)
    for what, graph in captured.items():  # right in the graph, too, and after all replays
        again = _verdict(entered[what], graph.first, exact, ranks.world)
        records[what] |= again if again["wrong"] else {}
    ranks.link.check()
    about = asdict(case) | {
        "ranks": ranks.world.size(), "bytes": case.read_bytes(), "sets": len(sets), "calls": case.calls(),
        "rounds": rounds, "beyond_caches": len(sets) * case.read_bytes() >= ROTATED_BYTES, "waiting_s": waiting_s,
        **read,
    }  # fmt: skip
    return [
        about | {"what": what, "kind": entered[what].kind} | record | _times(taken, what, case, record["wrong"])
        for what, record in records.items()
    ]


def contestants(
    q: Tensor, lengths: Tensor | None, first: tuple[Tensor, Tensor], ranks: Ranks, peers: Sequence[str]
) -> Iterator[Contestant]:
    """Ours; without lengths, which peers have no form for, also the exchange alone and the peers.

    first: the k and v by which a peer says whether it can run. Spread peers come last: a capture may fail there.
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
    yield Contestant(
        "nccl_all_gather", "exchange", lambda k, v: bind(gather, pack(local(q, k, v)), world),
        output=lambda gathered: merge(unpack(gathered)).out,
    )  # fmt: skip
    for name, peer in (LOCAL | SPREAD).items():
        if name in peers:
            kind, group = ("local", None) if name in LOCAL else ("spread", ranks.groups[name])
            prepare = bind(_prepare, peer, q, group)
            yield Contestant(name, kind, prepare, obstacle=peer.obstacle(q, *first))


def _prepare(peer: Peer, q: Tensor, group: ProcessGroup | None, k: Tensor, v: Tensor) -> Step:
    return peer.prepare(q, k, v, group)


def _try(
    contestant: Contestant, pairs: Sequence[tuple[Tensor, Tensor]], exact: tuple[Tensor, Tensor], ranks: Ranks
) -> tuple[list[Step], dict[str, Any]]:
    """A step for each k and v, if it can run and is right; and what is to be said of that, the same on every rank."""
    fault, steps, outs, extra = contestant.obstacle, [], [], None
    if fault is None:
        try:
            allocated = _restart_peak(pairs[0][0])
            for k, v in pairs:
                steps.append(contestant.prepare(k, v))
                outs.append(steps[-1]())
                if extra is None and allocated is not None:  # of the first alone
                    extra = torch.cuda.max_memory_allocated() - allocated
            ranks.link.synchronize()
        except (RuntimeError, ImportError, OSError) as error:  # other people's code, and the compilers that it calls
            fault = f"did not run: {one_line(error)}"
    fault = first_fault(fault, ranks.world)
    if fault is not None:
        unknown = dict.fromkeys(("peak_extra_bytes", "relative_error", "same_bits"))
        return [], unknown | {"wrong": False, "note": fault}
    extras = [its for its in gather_objects(extra, ranks.world) if its is not None]
    verdict = _verdict(contestant, outs[0], exact, ranks.world)
    return [] if verdict["wrong"] else steps, {"peak_extra_bytes": max(extras, default=None)} | verdict


def _restart_peak(tensor: Tensor) -> int | None:
    """Bytes that are allocated now, from which the peak counts; None on the CPU, which does not count them."""
    if not tensor.is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _verdict(
    contestant: Contestant, result: Tensor, exact: tuple[Tensor, Tensor], world: ProcessGroup
) -> dict[str, Any]:
    """The largest relative error of a rank, against its own keys' attention or all ranks'; ours: are the bits equal?"""
    out = result if contestant.output is None else contestant.output(result)
    right = exact[0] if contestant.kind in OWN else exact[1]
    worst = ((out - right).norm() / right.norm()).nan_to_num(nan=math.inf, posinf=math.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX, world)
    error, same_bits, note = float(worst), None, None
    if contestant.kind == "ours":
        outs = gather(out, world)
        same_bits = bool((outs == outs[0]).all())
        note = None if same_bits else "wrong: not the same bits on every rank"
    if error > MOST_ERROR:
        note = f"wrong: relative error {error:.1e}"
    finite = error if math.isfinite(error) else None  # JSON has no infinity
    return {"relative_error": finite, "same_bits": same_bits, "wrong": note is not None, "note": note}


def _streaming_read(case: Case, sets: Sequence[Tensor], rounds: int) -> dict[str, Any]:
    """As many bytes of each set, read once and nothing computed, with the best of READS."""
    words, runs = case.read_bytes() // sets[0].itemsize, {}
    for setting in READS:
        how = dict(zip(("block_bytes", "programs_per_sm", "num_warps"), setting, strict=True))
        steps = [streaming_read(kv.view(-1)[:words], **how) for kv in sets]
        _call_all(steps)
        graph = capture([steps[i % len(steps)] for i in range(case.calls())])
        assert isinstance(graph, Captured), graph
        runs[setting] = Run(graph.replay, ahead=True)
    taken = seconds_in_turns(runs, rounds)
    setting = min(READS, key=taken.__getitem__)
    read_s = taken[setting] / case.calls()
    return {"read_s": read_s, "read_setting": setting, "streaming_bytes_per_s": case.read_bytes() / read_s}


def _call_all(calls: Sequence[Step]) -> None:
    for call in calls:
        call()


def _times(taken: dict[tuple[str, str], float], what: str, case: Case, wrong: bool) -> dict[str, float | None]:
    times_s = {clock: taken.get((what, clock)) for clock in ("graph_s", "eager_s")}
    return {clock: None if wrong or time_s is None else time_s / case.calls() for clock, time_s in times_s.items()}
