"""`StepState`: the state of a static cache's decode steps, shared by the cache and its layers."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .cache_ranks import CacheRanks
from .cursor import Cursor


class StepState:
    """Where the decode steps of one cache have got to. Only the methods of this class change it.

    Attributes:
        cursor: the newest token's position on the device; None before the first step.
        is_stepping: True during a step's forward pass: layers and attention then use the cursor.
        is_unfinished: True if a step began and did not end, because an error interrupted it.
        cursor_is_stale: True if the host has changed the cache since the cursor was set.
        buffers_version: increases when buffers move; graphs that were captured before must not be replayed.
    """

    def __init__(self, ranks: CacheRanks) -> None:
        self.ranks = ranks
        self.cursor: Cursor | None = None
        self.is_stepping = self.is_unfinished = False
        self.cursor_is_stale = True
        self.buffers_version = 0

    @property
    def step_cursor(self) -> Cursor:
        assert self.cursor is not None, "outside of TreeCache.stepping"
        return self.cursor

    def needs_cursor(self, batch: int) -> bool:
        """True if the cursor must be set before a step of `batch` rows; an unfinished step may have advanced it."""
        return self.cursor_is_stale or self.is_unfinished or self.cursor is None or self.cursor.batch != batch

    def set_cursor(self, length: int, batch: int, device: torch.device, padding: Tensor | None) -> None:
        """Set the cursor behind the first `length` tokens. padding: see `Cursor.start`."""
        if self.cursor is None or self.cursor.batch != batch:
            self.cursor = Cursor(self.ranks, batch, device)
            self.buffers_changed()
        self.cursor.start(length, padding)
        self.cursor_is_stale = False

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Advance the cursor by one token; inside, layers and attention use it."""
        self.is_stepping = True
        try:
            self.step_cursor.advance()
            yield
        finally:
            self.is_stepping = False

    def set_unfinished(self, is_unfinished: bool) -> None:
        self.is_unfinished = is_unfinished

    def invalidate_cursor(self) -> None:
        self.cursor_is_stale = True

    def buffers_changed(self) -> None:
        self.buffers_version += 1
