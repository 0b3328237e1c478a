"""`tree-attention chat`: check the options, then start the ranks, which run chat_rank.py, and send them stdin."""

import multiprocessing
import threading
from typing import Any

import torch

from .checks import check_options, read_document
from .exits import under_torchrun
from .launch import run_on_ranks
from .options import ChatOptions
from .terminal import read_lines


def chat_on_ranks(options: ChatOptions) -> int:
    """Check everything that needs no model, then start the ranks. Returns the exit code."""
    document = read_document(options.file)
    check_options(options)
    if options.load is not None:
        from ..hf.save import read_manifest

        read_manifest(options.load)
    lines = None
    if not under_torchrun():  # ranks that we start do not inherit stdin
        lines = multiprocessing.get_context("spawn").SimpleQueue()
        threading.Thread(target=_send_lines, args=(lines,), daemon=True).start()
    return run_on_ranks(_on_rank, options.nproc, options.device, options, document, lines)


def _send_lines(lines: Any) -> None:
    """Put each line of stdin into the queue, then None."""
    try:
        for line in read_lines():
            lines.put(line)
    finally:
        lines.put(None)


def _on_rank(options: ChatOptions, document: str, lines: Any, device: torch.device) -> int:
    from .chat_rank import chat  # loads transformers, which takes seconds: only the ranks need it

    return chat(options, document, lines, device)
