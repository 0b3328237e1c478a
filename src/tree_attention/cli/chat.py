"""`tree-attention chat`. Only functions that run on the ranks import transformers: it takes seconds to load."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.sharedctypes import RawValue
from typing import Any

import torch
import torch.distributed as dist

from ..group import broadcast_from_first
from .launch import MODELS, run_on_ranks
from .options import ChatOptions, check_options, read_document
from .terminal import read_lines, reading_bar, under_torchrun

LOOK_S = 0.2  # between two looks for a signal while the first rank waits for a line
CONVERSATION_TOKENS = 8192  # default capacity after the document, for a static cache
QUESTION_TIMEOUT = timedelta(days=365)  # the user may take long to type the next question


class Terminal:
    """Carries lines, and requests to stop or to end, from the process at the terminal to the first rank."""

    def __init__(self) -> None:
        self.lines, self._writer = multiprocessing.Pipe(duplex=False)
        self.is_typed = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        # Shared memory. Only the first rank writes `asked` and `is_answering`, only this process `ends`.
        self.asked = RawValue("i")  # number of lines that the first rank asked for
        self.is_answering, self.stops, self.ends = (RawValue("b") for _ in range(3))

    def send_lines(self) -> None:
        """Send the lines of stdin. They end with None."""
        try:
            for line in self._typed_lines() if self.is_typed else read_lines():
                self._writer.send(line)
        finally:
            self._writer.send(None)

    def _typed_lines(self) -> Iterator[str]:
        """Yield lines that the user edits; earlier ones come back with the arrow keys."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` uses it

        for count in itertools.count(1):
            while self.asked.value < count:
                time.sleep(0.02)
            try:
                yield input("> ")
            except EOFError:
                sys.stdout.write("\n")
                return

    def on_signal(self, number: int, frame: Any = None) -> None:
        """Ctrl-C stops an answer, a second one ends the chat. Ranks that are still starting are killed."""
        if not self.asked.value or self.ends.value:
            sys.exit(128 + number)
        if number != signal.SIGINT or self.stops.value or not self.is_answering.value:
            self.ends.value = number
            if self.is_typed and not self.is_answering.value:
                os.write(1, b"\n")  # after the prompt
        self.stops.value = True

    def next_line(self) -> str | None:
        """Wait for a line; return None after the last one, or when a signal ends the chat."""
        self.is_answering.value = False
        self.asked.value += 1
        while not self.ends.value and not self.lines.poll(LOOK_S):
            pass
        line = None if self.ends.value else self.lines.recv()
        self.stops.value, self.is_answering.value = False, True
        return line


def chat_on_ranks(options: ChatOptions) -> int:
    """Check everything that needs no model, then start the ranks. Returns the exit code."""
    document = read_document(options.file)
    check_options(options)
    if options.load is not None:
        from ..hf.save_folder import read_manifest

        read_manifest(options.load)
    if under_torchrun():  # the first rank reads stdin itself
        return run_on_ranks(_chat, options.nproc, options.device, options, document, None)
    if options.save is not None:
        from ..hf.save_folder import check_writing

        check_writing(options.save)
    terminal = Terminal()
    sender = threading.Thread(target=terminal.send_lines, daemon=True)
    start: dict[str, Any] = {"preload": MODELS, "on_start": sender.start, "on_signal": terminal.on_signal}
    with _unchanged_terminal():
        code = run_on_ranks(_chat, options.nproc, options.device, options, document, terminal, **start)
    return 128 + terminal.ends.value if terminal.ends.value and not code else code


@contextlib.contextmanager
def _unchanged_terminal() -> Iterator[None]:
    """Restore the terminal's settings, which an interrupted `input` leaves changed."""
    if not (sys.stdin is not None and sys.stdin.isatty()):
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _chat(options: ChatOptions, document: str, terminal: Terminal | None, device: torch.device) -> int:
    """Answer each line, of the terminal or else of stdin; only the first rank reads and prints."""
    from transformers import AutoTokenizer

    from ..hf.chat_template import ChatTemplate
    from ..hf.save_folder import read_manifest
    from .conversation import Conversation
    from .models import StopOnRequest, check_positions, check_step_mode, load_model, open_session

    is_first = dist.get_rank() == 0
    check_step_mode(options.compiled, device)
    questions = _questions(terminal, dist.new_group(backend="gloo", timeout=QUESTION_TIMEOUT))
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
    torch.manual_seed(options.seed)
    requests: dict[str, Any] = {} if terminal is None else {"stopping_criteria": [StopOnRequest(terminal.stops)]}
    conversation = Conversation(session, options, requests)
    for line in questions:
        if line == "/quit":
            break
        conversation.take(line)
    return conversation.end()


def _questions(terminal: Terminal | None, group: Any) -> Iterator[str]:
    """Yield the first rank's lines on every rank, without the blank ones."""
    source = read_lines() if terminal is None else iter(terminal.next_line, None)
    while True:
        if not (terminal and terminal.is_typed) and group.rank() == 0 and sys.stderr.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        text = broadcast_from_first(next(source, None) if group.rank() == 0 else None, group)
        if text is None:
            return
        if text.strip():
            yield text.strip()
