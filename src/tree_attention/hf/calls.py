"""`Call`: a call that all ranks make together. They agree before anything is computed, and they all end it alike.

start   Each rank posts a digest of what must be equal. Only if digests differ do the ranks exchange what differs.
end     Each rank posts how the call ended. A rank that waits in a link looks for the records of its peers.

A rank that fails alone closes its connections, so that peers that wait in a collective raise, too. What waits on a GPU
is ended by a thread that looks for the records of peers that failed.
"""

import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import RanksDisagree, TreeAttentionError
from ..group import disagreement, resolve_group
from .cache import TreeCache
from .exchange import CacheExchange, Channel, channel_of, hang_up
from .inputs import adapters_of, as_text, autocast_of, check_ids, check_rows
from .link_sums import stop_links
from .peers import GRACE_S, LOOK_S, Peers, peers_of
from .tensor_parallel import sequence_axis, tensor_group

current: ContextVar["Call | None"] = ContextVar("current", default=None)


class Call:
    """`with Call(...) as call:`, inside of it `call.start()`, then what is computed.

    What is raised before `start` is this rank's fault, and travels in its vote. A call inside another is part of it.

    Args:
        name: what the user called.
        model: loaded with attn_implementation="tree_attention".
        cache: the TreeCache of the call, if there is one yet.

    Attributes:
        described: name -> plain value or tensor that must be equal on all ranks.
        result: the tokens that were written, if any; must be equal on all ranks.
    """

    def __init__(self, name: str, model: Any, cache: Any = None) -> None:
        self.name, self.outer = name, current.get()
        self.exchanges = [cache.exchange] if isinstance(cache, TreeCache) else []  # of the caches that it uses
        self.given = cache.ranks.given if isinstance(cache, TreeCache) else resolve_group(sequence_axis(model))
        self.tensor, self.mesh = tensor_group(model), getattr(model, "tree_attention_mesh", None)
        self.described: dict[str, Any] = {"call": name, "autocast": autocast_of(model)}
        if hasattr(model, "peft_config"):
            self.described["adapters"] = adapters_of(model)
        if isinstance(cache, TreeCache):
            self.described["cache"] = f"number {cache.exchange.number}, {cache.get_seq_length()} tokens"
        self.result: Tensor | None = None
        self.peers: Peers | None = None
        self.channel: Channel | None = None
        self.is_started = self.is_open = self.goes_on = False
        self._told: Exception | None = None  # what other ranks did
        self._ended = threading.Event()
        self._token: Token | None = None

    @property
    def groups(self) -> list[ProcessGroup]:
        """The groups to communicate over, by axis of the mesh."""
        sequence = self.given if self.channel is None else self.channel.group
        return [group for group in (sequence, self.tensor) if group is not None and group.size() > 1]

    def __enter__(self) -> "Call":
        if self.outer is None and self._token is None:
            self._token = current.set(self)
        return self

    def start(self) -> None:
        """Raise on every rank unless all ranks make this call and none has a fault. All ranks call it together."""
        for exchange in self.exchanges:
            exchange.check_usable()
        self._vote(None)
        for exchange in self.exchanges:
            (self.outer or self).use(exchange)

    def keep_open(self) -> None:
        """Leave the block without ending the call; another thread enters it again."""
        self.goes_on = True

    def _vote(self, fault: BaseException | None) -> None:
        self.is_started = True
        ranks = self._ranks() if self.outer is None else []
        if len(ranks) < 2:
            return
        self.peers, self.is_open = peers_of(ranks), True
        self.peers.calls += 1
        self.number = self.peers.calls
        described = {name: as_text(value) for name, value in self.described.items()}
        text = None if fault is None else _text(fault)
        digest = hashlib.sha256(json.dumps([described, text], sort_keys=True).encode()).hexdigest()
        votes = self._gather("start", f"{digest} {self.peers.must_renew:d}")
        if fault is not None or len({vote[:64] for vote in votes}) > 1:
            reports = [json.loads(vote) for vote in self._gather("why", json.dumps([described, text]))]
            self.is_open = False  # on every rank: nothing was computed
            if fault is not None and (not isinstance(fault, Exception) or {own for _, own in reports} == {text}):
                return  # the fault itself is raised
            if len({values["call"] for values, _ in reports}) > 1:  # then all else differs, too
                reports = [({"call": values["call"]}, own) for values, own in reports]
            raise RanksDisagree(disagreement(reports) or "ranks must make the same call") from fault
        self.channel = channel_of(self.given)
        if any(vote.endswith("1") for vote in votes):
            self._renew()
        if any(dist.get_backend(group) != "gloo" for group in self.groups):
            threading.Thread(target=self._stop_waiting_in_vain, args=(self.peers.for_thread(),), daemon=True).start()

    def use(self, exchange: CacheExchange) -> None:
        """Use the exchange of a cache. All ranks call it together."""
        if exchange not in self.exchanges:
            self.exchanges.append(exchange)
        exchange.reconnect()
        if self.peers is not None:
            exchange.watch_by(self._why_wait)

    def _ranks(self) -> list[int]:
        """Global ranks that make the call."""
        if self.mesh is not None:
            return self.mesh.mesh.flatten().tolist()
        group = self.given if self.given is not None and self.given.size() > 1 else self.tensor
        return [] if group is None else dist.get_process_group_ranks(group)

    def _gather(self, name: str, record: str) -> list[str]:
        assert self.peers is not None
        self.peers.post(f"{self.number}/{name}", record)
        return self.peers.gather(f"{self.number}/{name}")

    def _renew(self) -> None:
        """Replace what an earlier call that failed may have left half done."""
        assert self.peers is not None
        if self.tensor is not None or (self.channel is not None and not self.channel.renewable):
            self.is_open = False
            raise TreeAttentionError(
                "an earlier call failed, and its groups cannot be used again: start all ranks again"
            )
        if self.channel is not None:
            self.channel.renew()
        self.peers.must_renew = False

    def _why_wait(self) -> Exception | None:
        """Return the error of a rank that waits for a peer which has ended the call, or has died; None if none has."""
        assert self.peers is not None
        self._told = self._why(self.peers, self.peers.posted(f"{self.number}/end"))
        return self._told

    def _why(self, peers: Peers, records: Mapping[int, str]) -> Exception | None:
        ends = {rank: json.loads(record) for rank, record in records.items()}
        if ends:
            rank = min(ends, key=lambda rank: (not _is_cause(ends[rank]), rank))
            return TreeAttentionError(self._reason(rank, ends[rank]))
        try:
            peers.check_alive(f"{self.number}/end")
        except TreeAttentionError as died:
            return died
        return None

    def _stop_waiting_in_vain(self, peers: Peers) -> None:
        """In a thread: end what waits on the GPU for a peer that failed or died, unless this rank fails, too."""
        while not self._ended.wait(LOOK_S):
            posted = peers.posted(f"{self.number}/end")  # peers that end in order may be a little faster
            reason = self._why(peers, {rank: end for rank, end in posted.items() if json.loads(end)["fault"]})
            if reason is not None and not self._ended.wait(GRACE_S):
                self._told = reason
                for exchange in self.exchanges:
                    exchange.stop_waiting(reason)
                if self.tensor is not None:
                    stop_links(self.tensor)
                self._hang_up()
                return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._token is not None:
            current.reset(self._token)
            self._token = None
        if self.outer is not None:
            return
        if not self.is_started and error is not None:
            self._vote(error)
        if self.goes_on and error is None:
            self.goes_on = False
            return
        if self.is_open:
            assert self.peers is not None
            self.is_open = False
            try:
                self._end(error)
            finally:
                self.peers.leave(f"{self.number}/left")
                for exchange in self.exchanges:
                    exchange.watch_by(lambda: None)

    def _end(self, error: BaseException | None) -> None:
        """Post how the call ended on this rank. Raise, on every rank, unless all ended it alike."""
        assert self.peers is not None
        self._ended.set()
        was_told = error is not None and (self._told is not None or _lost_connection(error))
        progress = " ".join(exchange.progress() for exchange in self.exchanges)
        result = as_text(self.result)
        fault = None if error is None else str(error) if was_told else _text(error)
        own = {"fault": fault, "told": was_told, "progress": progress, "result": result}
        ends, reason = {self.peers.rank: own}, ""
        try:
            self.peers.post(f"{self.number}/end", json.dumps(own))
            ends |= self._ends(error, was_told)
        except TreeAttentionError as died:
            reason = str(died)
        if len(ends) == len(self.peers.ranks):
            if all(_is_cause(end) and end["progress"] == progress for end in ends.values()):
                return  # all failed at the same exchange
            if not any(end["fault"] for end in ends.values()):
                if all(end["result"] == result for end in ends.values()):
                    return
                reason = str(
                    disagreement([({"the text that was written": str(end["result"])}, None) for end in ends.values()])
                )
        for rank, end in sorted(ends.items(), key=lambda item: not _is_cause(item[1])):
            if end["fault"]:
                reason = reason or (self._reason(rank, end) if _is_cause(end) else end["fault"])
        self._give_up(reason)
        if error is None or was_told:
            raise TreeAttentionError(reason) from error

    def _ends(self, error: BaseException | None, was_told: bool) -> dict[int, dict[str, Any]]:
        """Return how the call ended, by rank. After an error this does not wait for all of them."""
        assert self.peers is not None
        name = f"{self.number}/end"
        if error is None:
            return {rank: json.loads(end) for rank, end in enumerate(self.peers.gather(name))}
        stop = time.monotonic() + GRACE_S
        while True:
            ends = {rank: json.loads(end) for rank, end in self.peers.posted(name).items()}
            is_known = was_told and any(map(_is_cause, ends.values()))
            if len(ends) == len(self.peers.ranks) or is_known or time.monotonic() > stop:
                return ends
            self.peers.check_alive(name)
            time.sleep(0.01)

    def _give_up(self, reason: str) -> None:
        assert self.peers is not None
        self.peers.must_renew = True
        for exchange in self.exchanges:
            exchange.fail(reason)
        self._hang_up()

    def _hang_up(self) -> None:
        """Close the connections that a peer may wait for. Only groups over gloo can be used again."""
        groups = self.groups if self.tensor is None else [*self.groups, self.given]
        for group in {group for group in groups if group is not None}:
            if dist.get_backend(group) == "gloo":
                hang_up(group)
            else:  # waits for graphs that hold collectives of the group
                threading.Thread(target=group.abort, daemon=True).start()

    def _reason(self, rank: int, end: Mapping[str, Any]) -> str:
        if end["fault"] is None:
            return f"rank {rank} left {self.name} while other ranks still wrote"
        return f"rank {rank} failed in {self.name}: {end['fault']}"


def as_one_call(function: Callable[..., None]) -> Callable[..., None]:
    """Make `function(model, input_ids, cache, **options)` one call of all ranks."""

    @functools.wraps(function)
    def together(model: Any, input_ids: Tensor, cache: Any, **options: Any) -> None:
        with Call(function.__name__, model, cache) as call:
            if isinstance(cache, TreeCache):  # else `function` raises
                compared = {name: value for name, value in options.items() if not callable(value)}
                call.described |= {"input_ids": input_ids, **compared}
                check_ids(model, input_ids)
                if input_ids.ndim == 2:  # else `function` raises
                    check_rows(cache, len(input_ids))
                call.start()
            function(model, input_ids, cache, **options)

    return together


def _is_cause(end: Mapping[str, Any]) -> bool:
    return end["fault"] is not None and not end["told"]


def _lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500].rstrip(": ")
