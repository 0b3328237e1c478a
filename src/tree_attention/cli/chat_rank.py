"""What each rank of `tree-attention chat` does: open the session, read, answer, save."""

import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoTokenizer

from ..errors import TreeAttentionError
from ..hf import Session
from ..hf.save import read_manifest
from .chat import typed
from .exits import say
from .inputs import check_positions, load_model, reading_bar, sequence_ranks, step_of
from .options import ChatOptions

ROOM = 8192  # tokens of talk after the document, by default
PATIENCE = timedelta(days=365)  # for whoever thinks about the next question


def chat(request: ChatOptions, document: str, lines: Any, device: torch.device) -> int:
    """Answer each line; only the first rank reads and prints. lines: a queue of them, or None for stdin."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    first, step = dist.get_rank() == 0, step_of(request.compiled, device)
    talk = dist.new_group(backend="gloo", timeout=PATIENCE)
    model = load_model(request.model, request.dtype, device, tensor_parallel=request.tensor_parallel)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    session = _session(request, model, tokenizer, document, device, step)
    if document:
        with reading_bar(len(tokenizer(document).input_ids), shown=first) as on_progress:
            session.read(document, chunk_tokens=request.chunk_tokens, on_progress=on_progress)
    if request.save is not None:
        session.save(request.save)
    torch.manual_seed(request.seed)
    how: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "do_sample": request.sample}
    if not request.sample:
        how |= dict.fromkeys(("temperature", "top_p", "top_k"))
    for question in _questions(lines if first else None, first, talk):
        try:
            if not request.extrapolate:
                asked = len(tokenizer(question).input_ids)
                check_positions(model.config, session.tokens.shape[1] + asked, request.max_new_tokens)
            for piece in session.ask(question, **how):
                if first:
                    say(piece)
        except TreeAttentionError as error:  # on every rank alike, and the session is as it was
            if first:
                sys.stderr.write(f"tree-attention: {error}\n")
        if first:
            say("\n")
    if request.save is not None:
        session.save(request.save)
    return 0


def _session(
    request: ChatOptions, model: Any, tokenizer: Any, document: str, device: torch.device, step: str
) -> Session:
    tokens = len(tokenizer(document).input_ids) if document else 0
    if request.load is not None:
        tokens += read_manifest(request.load)["tokens"]
    if not request.extrapolate:
        check_positions(model.config, tokens, request.max_new_tokens)
    room = request.max_tokens
    if room is None and device.type == "cuda":
        room = tokens + ROOM
    how: dict[str, Any] = {
        "group": sequence_ranks(model), "max_tokens": room, "block_tokens": request.block_tokens, "step": step,
    }  # fmt: skip
    if request.load is None:
        return Session.open(model, tokenizer, **how)
    return Session.load(request.load, model, tokenizer, **how)


def _questions(lines: Any, first: bool, talk: Any) -> Iterator[str]:
    """Lines that are not empty, the same on every rank, until there are no more."""
    source = typed() if lines is None else iter(lines.get, None)
    while True:
        line: list[str | None] = [None]
        if first:
            if sys.stderr.isatty():
                sys.stderr.write("> ")
                sys.stderr.flush()
            line = [next(source, None)]
        dist.broadcast_object_list(line, group=talk, group_src=0)
        [text] = line
        if text is None:
            return
        if text.strip():
            yield text.strip()
