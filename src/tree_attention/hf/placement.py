"""`Placement`: where the tokens of one cache lie, and how its ranks reach each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..decode import tree_decode
from ..errors import InputError, Unavailable
from ..group import Group, rank_and_size, resolve_group
from ..layout import Layout
from ..partial import Partial, spec_of
from ..reduce import Link, SharedMemoryLink, SymmetricLink, TwoLevel, choose_algorithm, received_bytes, tree_reduce
from .cursor import Cursor

PATIENCE_S = 300.0  # for a rank that compiles longer than this one; a dead one is noticed by whoever started it


class Placement:
    """What all layers of one cache share: the ranks, the layout, and the chunk that is being read, if any."""

    def __init__(self, group: Group | TwoLevel, block_tokens: int, max_tokens: int | None) -> None:
        self.given, self.max_tokens = group, max_tokens
        self.group = group.group if isinstance(group, TwoLevel) else resolve_group(group)
        self.rank, size = rank_and_size(self.group)
        self.layout = Layout(size, block_tokens)
        topology = group if isinstance(group, TwoLevel) and len(group.nodes) > 1 else None  # one node: like its group
        self.node_sizes = () if topology is None else tuple(map(len, topology.nodes))
        self.link: Link | None = topology or _shared_memory(self.group)
        self.asks_for_link = size > 1 and topology is None  # on GPUs, also of a group that has gloo beside NCCL
        self.chunk: tuple[int, int] | None = None  # set while each rank feeds only its own part of these slots
        self.reserved = 0
        self.received_bytes = 0.0
        self.cursor: Cursor | None = None
        self.is_stepping = False
        self.moved = True  # the host has changed the cache since the cursor was last set
        self.version = 0  # of the buffers: a graph that was captured with others must not be replayed

    @property
    def stepping_cursor(self) -> Cursor:
        assert self.cursor is not None, "within TreeCache.stepping"
        return self.cursor

    @property
    def most_tokens(self) -> int:
        assert self.max_tokens is not None, "a static cache"
        return self.max_tokens

    @property
    def capacity(self) -> int:
        """Slots that this rank's buffers of a static cache hold, without the unused one behind them."""
        return max(self.layout.local_length(self.most_tokens, self.rank), 1)

    def check_room(self, length: int) -> None:
        """Raise InputError if a static cache cannot hold so many tokens."""
        if self.max_tokens is not None and length > self.max_tokens:
            raise InputError(
                f"this TreeCache has room for {self.max_tokens} tokens over all ranks, {length} are needed: "
                "make it with a larger max_tokens"
            )

    def step_over(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
        """A step's attention `[B, 1, H, D_v]` over all ranks' keys, rounded; how: as in `tree_decode`."""
        if self.asks_for_link and q.is_cuda:
            self.link, self.asks_for_link = _symmetric(self.group, q, v), False
        if not torch.compiler.is_compiling():
            self._note(q.device.type, q.shape[0] * q.shape[1] * q.shape[2], v.shape[3], linked=self.link is not None)
        group = self.group if self.link is None else self.link
        return tree_decode(q, k, v, group=group, local_seqlens=self.stepping_cursor.held, mask=mask, **how)

    def reduce(self, partial: Partial) -> Partial:
        """The merge over all ranks, and a note of its bytes."""
        linked = self.link is not None and self.link.obstacle(spec_of(partial)) is None
        self._note(partial.out.device.type, partial.lse.numel(), partial.out.shape[3], linked=linked)
        return tree_reduce(partial, self.link if linked else self.group)

    def _note(self, device_type: str, rows: int, head_dim: int, *, linked: bool) -> None:
        size, nodes = self.layout.world_size, self.node_sizes
        algorithm = choose_algorithm(device_type, size, linked=linked, nodes=len(nodes))
        self.received_bytes += received_bytes(
            algorithm, rows=rows, head_dim=head_dim, world_size=size, node_sizes=nodes
        )


def _symmetric(group: ProcessGroup | None, q: Tensor, v: Tensor) -> SymmetricLink | None:
    """A link for decode steps like this one if the GPUs can have one; every rank is here at the same step."""
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    try:
        return SymmetricLink(group, rows=rows, head_dim=v.shape[3], timeout_s=PATIENCE_S)
    except Unavailable:  # on every rank alike
        return None


def _shared_memory(group: ProcessGroup | None) -> SharedMemoryLink | None:
    """A link for CPU tensors if the ranks can have one: a gloo group on one host."""
    if group is None or group.size() == 1 or "gloo" not in str(dist.get_backend_config(group)):
        return None
    try:
        return SharedMemoryLink(group)
    except Unavailable:  # several hosts; on every rank alike
        return None
