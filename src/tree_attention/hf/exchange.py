"""`CacheRanks`: the ranks of one cache, and the tokens that each holds. `CacheExchange`: how they reach each other.

`Channel`: the group that caches over the same ranks use. With gloo it is a group of their own, which is replaced after
a failed call: a collective that is half done would meet the next one.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from ..errors import InputError, Unavailable
from ..group import Group
from ..layout import Layout
from ..partial import Partial, PartialSpec, spec_of
from ..reduce import SharedMemoryLink, SymmetricLink, TwoLevel, check_no_gradient, resolve_reduction, run_reduction
from ..reduce.link import Link
from .peers import peers_of
from .tensor_parallel import tensor_ranks

_channels: weakref.WeakKeyDictionary[Any, dict[Any, "Channel"]] = weakref.WeakKeyDictionary()  # by default group, ranks
HANG_UP_TAG = 7315  # of no other message
LINK_TOKENS = 16  # over all rows: what a link has room for at least
TIMEOUT_S = 300.0  # a rank may compile for longer than the others; a dead one is noticed by the process that started it


class Channel:
    """The group over which the caches of some ranks exchange. All ranks create it together; see `channel_of`."""

    def __init__(self, given: ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(given)
        # Not for GPUs: there a second group costs memory, and NCCL cannot end exchanges that are half done.
        self.renewable = dist.get_backend(given) == "gloo"
        self._timeout = given._get_backend(torch.device("cpu")).options._timeout if self.renewable else None
        self.caches = self.renewals = 0  # so far, in the same order on every rank
        self.group = self._new_group() if self.renewable else given

    def _new_group(self) -> Any:
        """Return a group over the channel's ranks, which all call this together."""
        # `new_group` would name it by the number of groups that this rank has, which may differ between ranks.
        name, store = f"{peers_of(self.ranks).name}{self.renewals}", c10d._get_default_store()
        rank, size = self.ranks.index(dist.get_rank()), len(self.ranks)
        create: Any = c10d._new_process_group_helper
        group, _ = create(size, rank, self.ranks, "gloo", store, name, timeout=self._timeout)
        c10d._world.pg_group_ranks[group] = {other: index for index, other in enumerate(self.ranks)}
        c10d._world.pg_names.pop(group, None)  # it does not count when torch names the caller's groups
        return group

    def renew(self) -> None:
        """Replace the group. All ranks call it together."""
        c10d._world.pg_names[self.group] = self.group.group_name  # `destroy_process_group` deletes it
        dist.destroy_process_group(self.group)
        self.renewals += 1
        self.group = self._new_group()


def channel_of(given: ProcessGroup | None) -> Channel | None:
    """Return the channel of the ranks of a group; None for one process. All ranks call it together."""
    if given is None or given.size() == 1:
        return None
    if dist.get_backend(given) != "gloo":
        return Channel(given)
    known, ranks = _channels.setdefault(dist.group.WORLD, {}), tuple(dist.get_process_group_ranks(given))
    if ranks not in known:
        known[ranks] = Channel(given)
    return known[ranks]


def hang_up(group: ProcessGroup) -> None:
    """Close this rank's gloo connections, so that peers which wait for it raise. gloo's own `abort` does not."""
    for peer in range(group.size()):
        if peer != group.rank():
            with contextlib.suppress(RuntimeError):  # a receive that runs out of time closes its connection
                group.recv([torch.empty(1)], peer, HANG_UP_TAG).wait(timedelta(milliseconds=1))


@dataclass(frozen=True)
class CacheRanks:
    """Where the tokens of a cache lie; fixed when the cache is made."""

    given: ProcessGroup | None  # as the caller passed it; None for a single process
    rank: int
    layout: Layout
    max_tokens: int | None  # over all ranks; None for a cache that grows
    channel: Channel | None = None  # see `channel_of`

    @property
    def group(self) -> ProcessGroup | None:
        """The group to communicate over."""
        return self.given if self.channel is None else self.channel.group

    @property
    def static_capacity(self) -> int:
        """Number of slots in this rank's buffers of a static cache, without the extra one that is never read."""
        return max(self.held(self.max_tokens or 0), 1)

    def held(self, length: int) -> int:
        """Number of slots that this rank holds of the first `length` slots."""
        return self.layout.local_length(length, self.rank)

    def slots(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """This rank's slots in `start .. stop - 1`: int64, ascending."""
        return self.layout.slots(start, stop, self.rank, device=device)

    def check_capacity(self, length: int) -> None:
        """Raise InputError if a static cache cannot hold `length` tokens."""
        if self.max_tokens is not None and length > self.max_tokens:
            raise InputError(
                f"this TreeCache has room for {self.max_tokens} tokens over all ranks, {length} are needed: "
                "make it with a larger max_tokens"
            )


class CacheExchange:
    """The links of one cache, and the bytes received for attention. Only the methods of this class change it."""

    def __init__(self, group: Group | TwoLevel, ranks: CacheRanks, config: PreTrainedConfig) -> None:
        topology = group if isinstance(group, TwoLevel) and len(group.nodes) > 1 else None  # one node: like its group
        self.ranks, self._topology = ranks, topology
        self.link: Link | None = None  # None if the process group is used
        self.link_pending = topology is None and ranks.layout.world_size > 1  # a SymmetricLink, made at the first step
        self.failure: str | None = None  # what broke off a call that used the cache, until `recover`
        self.stopped: Exception | None = None  # why a call that still runs must end, on GPUs
        self.number = 0  # among the caches over these ranks
        if ranks.channel is not None:
            ranks.channel.caches += 1
            self.number = ranks.channel.caches
        self._connect()
        text: Any = config.get_text_config(decoder=True)
        heads, names = getattr(text, "num_attention_heads", None) or 1, ("head_dim", "v_head_dim", "global_head_dim")
        head_dim = max(getattr(text, name, None) or 0 for name in names) or getattr(text, "hidden_size", 0) // heads
        # Query heads per rank, and an upper bound on D_v: a link for too few would not be used.
        self.heads, self.head_dim = heads // tensor_ranks(config), max(head_dim, 1)
        self.received_bytes = 0.0

    def _connect(self) -> None:
        """Make the link over the channel's present group."""
        self._renewals = 0 if self.ranks.channel is None else self.ranks.channel.renewals
        if self._topology is None:
            self.link = _shared_memory_link(self.ranks.group)
        else:
            self.link = copy.copy(self._topology)
            self.link.group = self.ranks.group

    def watch_by(self, question: Callable[[], Exception | None]) -> None:
        """Let a link that waits ask whether it waits in vain; see `SharedMemoryLink.watch`."""
        for link in (self.link, getattr(self.link, "link", None)):
            if isinstance(link, SharedMemoryLink):
                link.watch = question

    def stop_waiting(self, reason: Exception) -> None:
        """End what waits on the GPU for a rank that failed, with undefined numbers. For another thread to call."""
        self.stopped = reason
        if isinstance(self.link, SymmetricLink):
            self.link.stop_waiting()

    def reconnect(self) -> None:
        """Use the channel's present group, after a failed call replaced it. All ranks call it together."""
        if self.ranks.channel is not None and self.ranks.channel.renewals != self._renewals:
            self._connect()

    def fail(self, reason: str) -> None:
        """Note that ranks hold different tokens. The link may hold messages that nobody has read."""
        self.failure, self.link = reason, None

    def recover(self) -> None:
        """Forget the failure; the cache is empty, or holds the same tokens on every rank again."""
        self.failure = self.stopped = None

    def check_usable(self) -> None:
        if self.failure is not None:
            raise InputError(
                f"this TreeCache is unusable, because {self.failure}: call its reset() on every rank, or create a new "
                "one, and pass the whole text again"
            )

    def progress(self) -> str:
        """A text that is equal on ranks that have made the same exchanges."""
        return f"{self.received_bytes} {getattr(self.link, 'epoch', 0)}"

    @property
    def target(self) -> Any:
        """What `tree_decode` and `tree_reduce` take as the group."""
        return self.ranks.group if self.link is None else self.link

    def link_for_steps(self, batch: int, tokens: int, device: torch.device) -> bool:
        """Make a SymmetricLink for such steps unless the link fits or GPUs do not support one; True if made.

        All ranks call this together, before a step. A link for fewer rows or tokens is replaced. With few rows the
        first one has room for the largest step, since graphs are captured anew after a replacement.
        """
        if device.type != "cuda" or not self.link_pending:
            return False
        spec = PartialSpec((batch, tokens, self.heads, self.head_dim), torch.float32, device)
        if self.link is not None and self.link.obstacle(spec) is None:
            return False
        tokens = max(tokens, LINK_TOKENS // batch)
        try:
            self.link = SymmetricLink(
                self.ranks.group, rows=batch * tokens * self.heads, head_dim=self.head_dim, timeout_s=TIMEOUT_S
            )
        except Unavailable:  # on every rank alike
            self.link_pending = False
            return False
        return True

    def reduce(self, partial: Partial) -> Partial:
        """Merge the partials of all ranks, and count the bytes."""
        reduction = resolve_reduction(spec_of(partial), self.target)
        check_no_gradient(reduction.world_size, *partial)
        self.count(reduction.received_bytes)
        return run_reduction(partial, reduction)

    def count(self, received: float) -> None:
        """Count bytes that this rank received."""
        self.received_bytes += received


def _shared_memory_link(group: ProcessGroup | None) -> SharedMemoryLink | None:
    """Return a link for CPU tensors if the group has gloo and all its ranks are on one host."""
    if group is None or group.size() == 1 or "gloo" not in str(dist.get_backend_config(group)):
        return None
    try:
        return SharedMemoryLink(group)
    except Unavailable:  # several hosts; on every rank alike
        return None
