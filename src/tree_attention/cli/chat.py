"""`tree-attention chat`. Only functions that run on the ranks import transformers: it takes seconds to load."""

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import TreeAttentionError
from ..group import broadcast_from_first
from .launch import MODELS, run_on_ranks
from .options import ChatOptions, check_options, read_document
from .terminal import read_lines, reading_bar, say, under_torchrun

CONVERSATION_TOKENS = 8192  # default capacity after the document, for a static cache
QUESTION_TIMEOUT = timedelta(days=365)  # the user may take long to type the next question


def chat_on_ranks(options: ChatOptions) -> int:
    """Check everything that needs no model, then start the ranks. Returns the exit code."""
    document = read_document(options.file)
    check_options(options)
    if options.load is not None:
        from ..hf.save import read_manifest

        read_manifest(options.load)
    # Ranks that we start do not inherit stdin.
    lines, writer = (None, None) if under_torchrun() else multiprocessing.Pipe(duplex=False)
    sender = threading.Thread(target=_send_lines, args=(writer,), daemon=True)
    start: dict[str, Any] = {"preload": MODELS, "on_start": sender.start}
    return run_on_ranks(_chat, options.nproc, options.device, options, document, lines, **start)


def _send_lines(writer: Any) -> None:
    try:
        for line in read_lines():
            writer.send(line)
    finally:
        writer.send(None)


def _chat(options: ChatOptions, document: str, lines: Any, device: torch.device) -> int:
    """Answer each line of the pipe, or of stdin if it is None; only the first rank reads and prints."""
    from transformers import AutoTokenizer

    from ..hf.chat_template import ChatTemplate
    from ..hf.save import read_manifest
    from .models import check_positions, check_step_mode, generate_kwargs, load_model, open_session

    is_first = dist.get_rank() == 0
    check_step_mode(options.compiled, device)
    questions = _questions(lines, dist.new_group(backend="gloo", timeout=QUESTION_TIMEOUT))
    model = load_model(options.model, options.dtype, device, tensor_parallel=options.tensor_parallel)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    template = ChatTemplate.from_tokenizer(tokenizer)
    text = torch.tensor(template.message_ids(tokenizer, document), dtype=torch.long)
    tokens = len(text) + (0 if options.load is None else read_manifest(options.load)["tokens"])
    check_positions(options, model.config, tokens, options.max_new_tokens)
    default = tokens + CONVERSATION_TOKENS if device.type == "cuda" else None
    session = open_session(options, model, tokenizer, options.max_tokens or default, template)
    if document:
        with reading_bar(len(text), shown=is_first) as on_progress:
            session.read(text, chunk_tokens=options.chunk_tokens, on_progress=on_progress)
    if options.save is not None:
        session.save(options.save)
    torch.manual_seed(options.seed)
    for question in questions:
        try:
            tokens = session.tokens.shape[1] + session.count_tokens(question)
            check_positions(options, model.config, tokens, options.max_new_tokens)
            for piece in session.ask(question, **generate_kwargs(options)):
                if is_first:
                    say(piece)
        except TreeAttentionError as error:  # the same on every rank, and the session is as it was
            if is_first:
                sys.stderr.write(f"tree-attention: {error}\n")
        if is_first:
            say("\n")
    if options.save is not None:
        session.save(options.save)
    return 0


def _questions(lines: Any, group: Any) -> Iterator[str]:
    """Yield the first rank's lines on every rank, without the blank ones."""
    source = read_lines() if lines is None else iter(lines.recv, None)
    while True:
        if group.rank() == 0 and sys.stderr.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        text = broadcast_from_first(next(source, None) if group.rank() == 0 else None, group)
        if text is None:
            return
        if text.strip():
            yield text.strip()
