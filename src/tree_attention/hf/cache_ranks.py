"""`CacheRanks`: the ranks of one cache and the tokens that each of them holds."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import InputError
from ..layout import Layout


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
