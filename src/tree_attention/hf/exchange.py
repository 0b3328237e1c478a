"""`CacheRanks`: the ranks of one cache, and the tokens that each holds. `CacheExchange`: how they reach each other."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from ..errors import InputError, Unavailable
from ..group import Group
from ..layout import Layout
from ..partial import Partial, PartialSpec, spec_of
from ..reduce import SharedMemoryLink, SymmetricLink, TwoLevel, check_no_gradient, resolve_reduction, run_reduction
from ..reduce.link import Link
from .tensor_parallel import tensor_ranks

TIMEOUT_S = 300.0  # a rank may compile for longer than the others; a dead one is noticed by the process that started it


@dataclass(frozen=True)
class CacheRanks:
    """Where the tokens of a cache lie; fixed when the cache is made."""

    group: ProcessGroup | None  # None for a single process
    rank: int
    layout: Layout
    max_tokens: int | None  # over all ranks; None for a cache that grows

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
        self.ranks = ranks
        self.link: Link | None = topology or _shared_memory_link(ranks.group)  # None if the process group is used
        self.link_pending = topology is None and ranks.layout.world_size > 1  # a SymmetricLink, made at the first step
        text: Any = config.get_text_config(decoder=True)
        heads, names = getattr(text, "num_attention_heads", None) or 1, ("head_dim", "v_head_dim", "global_head_dim")
        head_dim = max(getattr(text, name, None) or 0 for name in names) or getattr(text, "hidden_size", 0) // heads
        # Query heads per rank, and an upper bound on D_v: a link for too few would not be used.
        self.heads, self.head_dim = heads // tensor_ranks(config), max(head_dim, 1)
        self.received_bytes = 0.0

    @property
    def target(self) -> Any:
        """What `tree_decode` and `tree_reduce` take as the group."""
        return self.ranks.group if self.link is None else self.link

    def link_for_steps(self, batch: int, device: torch.device) -> bool:
        """Make a SymmetricLink for steps of `batch` rows unless the link fits or GPUs do not support one; True if made.

        All ranks call this together, before a step. A link for fewer rows is replaced.
        """
        if device.type != "cuda" or not self.link_pending:
            return False
        spec = PartialSpec((batch, 1, self.heads, self.head_dim), torch.float32, device)
        if self.link is not None and self.link.obstacle(spec) is None:
            return False
        try:
            self.link = SymmetricLink(self.ranks.group, rows=spec.rows(), head_dim=self.head_dim, timeout_s=TIMEOUT_S)
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
