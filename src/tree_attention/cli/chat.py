"""`tree-attention chat`: questions about a document, line by line, the cache spread over ranks, kept if asked for."""

import io
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .checks import check_options, read_document
from .exits import under_torchrun
from .launch import run_on_ranks
from .options import ChatOptions


def chat_on_ranks(options: ChatOptions) -> int:
    """Check what needs no model, then start the ranks, and hand them the lines of stdin; returns the exit code."""
    document = read_document(options.file)
    check_options(
        options.model, options.dtype, max_tokens=options.max_tokens,
        max_new_tokens=options.max_new_tokens, chunk_tokens=options.chunk_tokens, block_tokens=options.block_tokens,
    )  # fmt: skip
    if options.load is not None:
        from ..hf.save import read_manifest

        read_manifest(options.load)
    lines = None
    if not under_torchrun():  # ranks that we start do not have our stdin
        lines = multiprocessing.get_context("spawn").SimpleQueue()
        threading.Thread(target=_hand_over, args=(lines,), daemon=True).start()
    return run_on_ranks(_on_rank, options.nproc, options.device, options, document, lines)


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


def _on_rank(options: ChatOptions, document: str, lines: Any, device: torch.device) -> int:
    from .chat_rank import chat  # with transformers, which takes seconds to load and only ranks need

    return chat(options, document, lines, device)
