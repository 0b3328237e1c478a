"""What the ranks of `chat` do with each line of the user. All do the same; only the first one prints."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import TreeAttentionError
from .models import check_positions, generate_kwargs
from .options import ChatOptions
from .terminal import say

HELP = """/save      save now, to the folder of --save
/rewind    take back the last question and its answer
/new       take back all questions
/help      show this
/quit      end, as Ctrl-D does
Ctrl-C stops an answer.
"""


class Conversation:
    """A session, and the questions that can be taken back.

    requests: arguments of `Session.ask` by which the user stops an answer.

    Attributes:
        is_saved: False if the last save failed.
    """

    def __init__(self, session: Any, options: ChatOptions, requests: dict[str, Any]) -> None:
        self.session, self.options, self.requests = session, options, requests
        self.is_first = dist.get_rank() == 0
        self._before: list[tuple[int, bool]] = []  # each question: number of tokens, and whether a message was open
        if sys.stderr.isatty():
            ranks = "1 rank" if dist.get_world_size() == 1 else f"{dist.get_world_size()} ranks"
            tokens, megabytes = session.tokens.shape[1], session.cache.kv_bytes / 1e6
            self.tell(f"{Path(options.model).name} on {ranks} ({session.model.device.type}), ")
            self.tell(f"{tokens} tokens, {megabytes:.1f} MB of keys and values per rank\n")
            self.tell("Ask a question. /help shows the commands, Ctrl-C stops an answer, Ctrl-D ends the chat.\n")
        self.save()

    def tell(self, text: str) -> None:
        """Write to stderr."""
        if self.is_first:
            say(text, sys.stderr)

    def take(self, line: str) -> None:
        """Answer a question, or obey a command; then save. An error is told; the session is as it was before."""
        before = self.session.tokens.shape[1]
        try:
            if line.startswith("/"):
                self._obey(line)
            else:
                self._answer(line)
        except TreeAttentionError as error:  # the same on every rank
            self.tell(f"tree-attention: {error}\n")
            self._say("\n")
        if not self.is_saved or line == "/save" or self.session.tokens.shape[1] != before:
            self.save()

    def save(self) -> None:
        """Save the session if there is a folder for it."""
        self.is_saved = True
        if self.options.save is not None:
            try:
                self.session.save(self.options.save)
            except TreeAttentionError as error:
                self.is_saved = False
                self.tell(f"tree-attention: {error}\n")

    def end(self) -> int:
        """Say where the conversation is kept. Returns the exit code."""
        if not self.is_saved:  # a disk that was full may have room again
            self.save()
        if self.options.save is not None and self.is_saved:
            self.tell(f"saved to {self.options.save}\n")
        return 0 if self.is_saved else 2

    def _answer(self, question: str) -> None:
        session, options = self.session, self.options
        before = session.tokens.shape[1], session.in_question
        tokens = before[0] + session.count_tokens(question)
        check_positions(options, session.model.config, tokens, options.max_new_tokens)
        for piece in session.ask(question, **generate_kwargs(options), **self.requests):
            self._say(piece)
        self._say("\n")
        self._before.append(before)

    def _obey(self, command: str) -> None:
        if command in ("/rewind", "/new"):
            if not self._before:
                self.tell("there is no question to take back\n")
                return
            index = 0 if command == "/new" else -1
            length, in_question = self._before[index]
            self.session.rewind(self.session.tokens.shape[1] - length)
            self.session.in_question = in_question
            del self._before[index:]
        elif command != "/save" or self.options.save is None:
            self.tell(HELP)

    def _say(self, text: str) -> None:
        if self.is_first:
            say(text)
