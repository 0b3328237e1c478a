"""`tree-attention chat`: questions about a document, line by line, the cache spread over ranks, kept if asked for."""

import io
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checks import check_options, read_document
from .exits import under_torchrun
from .launch import run_on_ranks


@dataclass(frozen=True)
class Request:
    """The options of `chat`."""

    model: str
    file: Path | None
    load: Path | None
    save: Path | None
    max_tokens: int | None
    max_new_tokens: int
    sample: bool
    seed: int
    dtype: str
    device: str
    tensor_parallel: int
    block_tokens: int
    chunk_tokens: int | None
    compiled: bool
    extrapolate: bool


def chat_on_ranks(request: Request, nproc: int | None) -> int:
    """Check what needs no model, then start the ranks, and hand them the lines of stdin; returns the exit code."""
    document = read_document(request.file)
    check_options(
        request.model, request.dtype, max_tokens=request.max_tokens,
        max_new_tokens=request.max_new_tokens, chunk_tokens=request.chunk_tokens, block_tokens=request.block_tokens,
    )  # fmt: skip
    if request.load is not None:
        from ..hf.save import read_manifest

        read_manifest(request.load)
    lines = None
    if not under_torchrun():  # ranks that we start do not have our stdin
        lines = multiprocessing.get_context("spawn").SimpleQueue()
        threading.Thread(target=_hand_over, args=(lines,), daemon=True).start()
    return run_on_ranks(_on_rank, nproc, request.device, request, document, lines)


def _hand_over(lines: Any) -> None:
    try:
        for line in typed():
            lines.put(line)
    finally:
        lines.put(None)


def typed() -> Iterator[str]:
    """The lines of stdin, if it is open; what is no text in its encoding comes as replacement characters."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin is not None:
        yield from iter(sys.stdin.readline, "")


def _on_rank(request: Request, document: str, lines: Any, device: torch.device) -> int:
    from .chat_rank import chat  # with transformers, which takes seconds to load and only ranks need

    return chat(request, document, lines, device)
