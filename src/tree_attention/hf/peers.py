"""`Peers`: the ranks that call together. They post records in torch's store, which no failed rank can block."""

import copy
import hashlib
import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import TreeAttentionError

LOOK_S = 0.2  # between two looks for ranks that have ended
LONGEST_WAIT_S = 1800.0  # for a rank that makes the call late, as torch's own groups wait
GRACE_S = 3.0  # for the other ranks to fail alike, or to have seen that this one did
DYING_S = 1.0  # a killed process closes its connections first and has ended a moment later
KEPT_RECORDS = 64  # a call has three, and peers read them while the next calls are made
_known: weakref.WeakKeyDictionary[Any, dict[Any, "Peers"]] = weakref.WeakKeyDictionary()  # by default group, ranks


class Peers:
    """The ranks `ranks` (global numbers, this one among them). All create it together; see `peers_of`."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks, self.rank = ranks, ranks.index(dist.get_rank())
        self.calls = 0  # made so far, in the same order on every rank
        self.must_renew = False  # a call failed: exchanges may be half done, on another rank if not here
        self._posted: list[str] = []
        self._connection: Any = None  # to the store; None for the default group's
        name = "tree_attention/" + hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        lives = _default_store().add(f"{name}/{self.rank}", 1)  # the store may outlive a default group
        self.name = f"{name}/{lives}/"
        self._processes: dict[int, str] = {}
        self._store.set(f"process/{self.rank}", _process(os.getpid()))

    @property
    def _store(self) -> Any:
        # The default group's is not kept: rank 0's would keep its port.
        return dist.PrefixStore(self.name, self._connection or _default_store())

    def for_thread(self) -> "Peers":
        """Return the same peers for another thread: while a store waits, it answers nobody else."""
        other = copy.copy(self)
        other._connection = _default_store().clone()
        return other

    def post(self, name: str, text: str) -> None:
        """Post this rank's record `name` for all peers, and delete old ones."""
        try:
            store = self._store
            self._posted.append(f"{name}/{self.rank}")
            store.set(self._posted[-1], text)
            if len(self._posted) > KEPT_RECORDS:
                store.delete_key(self._posted.pop(0))
        except dist.DistError as error:
            raise self._lost_store(name) from error

    def gather(self, name: str) -> list[str]:
        """Return the records `name` of all ranks, in rank order. Waits for them, but not for a process that ended."""
        keys, start = self._keys(name), time.monotonic()
        try:
            store = self._store
            while not _arrived(store, keys):
                self.check_alive(name)
                if time.monotonic() - start > LONGEST_WAIT_S:
                    late = [rank for rank in range(len(keys)) if not store.check([keys[rank]])]
                    raise TreeAttentionError(f"ranks {late} did not make the call within {LONGEST_WAIT_S:.0f} s")
            if len(self._processes) < len(keys):  # once: without the store nobody could ask who died
                self._processes = dict(enumerate(map(bytes.decode, store.multi_get(self._keys("process")))))
            return [value.decode() for value in store.multi_get(keys)]
        except dist.DistError as error:
            raise self._lost_store(name) from error

    def leave(self, name: str) -> None:
        """Post that this rank needs the store no more. Rank 0, whose process may hold the store, leaves last."""
        stop, keys = time.monotonic() + GRACE_S, self._keys(name)
        try:
            self.post(name, "")
            while dist.get_rank() == 0 and not _arrived(self._store, keys) and time.monotonic() < stop:
                keys = [f"{name}/{rank}" for rank, process in self._processes.items() if not _has_ended(process)]
        except (dist.DistError, TreeAttentionError):  # the process that held the store has ended
            return

    def posted(self, name: str) -> dict[int, str]:
        """Return the records `name` that were posted so far, by rank."""
        try:
            store = self._store
            return {rank: store.get(key).decode() for rank, key in enumerate(self._keys(name)) if store.check([key])}
        except dist.DistError:
            return {}

    def check_alive(self, name: str) -> None:
        """Raise TreeAttentionError if the process of a peer on this host has ended and posted no record `name`."""
        for rank, key in enumerate(self._keys("process")):
            if rank not in self._processes:
                try:
                    if not self._store.check([key]):
                        continue
                    self._processes[rank] = self._store.get(key).decode()
                except dist.DistError:
                    continue
            if _has_ended(self._processes[rank]) and rank not in self.posted(name):
                raise TreeAttentionError(
                    f"rank {rank} has ended without an error, it may have been killed: start all ranks again"
                )

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(len(self.ranks))]

    def _lost_store(self, name: str) -> TreeAttentionError:
        """Return the error of a rank that cannot reach the store: a peer died, if one is known to."""
        stop = time.monotonic() + DYING_S
        while time.monotonic() < stop:
            try:
                self.check_alive(name)
            except TreeAttentionError as died:
                return died
            time.sleep(0.01)
        return TreeAttentionError(
            "lost the store of the process group, the process that holds it has ended: start all ranks again"
        )


def peers_of(ranks: Sequence[int]) -> Peers:
    """Return the Peers of these global ranks, the same object until the default group ends."""
    known, ranks = _known.setdefault(dist.group.WORLD, {}), tuple(ranks)
    if ranks not in known:
        known[ranks] = Peers(ranks)
    return known[ranks]


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _arrived(store: Any, keys: list[str]) -> bool:
    """Wait for the keys, at most `LOOK_S`; return whether all are there."""
    stop, pause = time.monotonic() + LOOK_S, 2e-5
    while not store.check(keys):  # a FileStore's own `wait` looks every 10 ms, and a TCPStore's warns when time is up
        if time.monotonic() > stop:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.005)
    return True


def _process(pid: int) -> str:
    """Identify a running process of this host as "host pid start"; "" where there is no /proc."""
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{host} {pid} {fields[18]}"


def _has_ended(process: str) -> bool:
    """Whether a process of this host, as identified by `_process`, runs no more."""
    own = _process(os.getpid()).split()
    there = process.split()
    return bool(own and there) and own[0] == there[0] and _process(int(there[1])) != process
