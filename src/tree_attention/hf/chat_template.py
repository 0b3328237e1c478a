"""`ChatTemplate`: the text that a tokenizer's chat template puts around messages, as strings to concatenate."""

import re
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

PLACEHOLDERS = ("\x02a\x03", "\x02b\x03", "\x02c\x03")  # messages that no template contains or changes


@dataclass(frozen=True)
class ChatTemplate:
    """The text around messages.

    Attributes:
        opening: before the first user message: the start of the text, a default system message.
        answer_prefix: between a user message and the answer to it.
        next_prefix: between an answer and the next user message.
        separator: between a text that was read and the question about it; both are one user message.
    """

    opening: str = ""
    answer_prefix: str = "\n\n"
    next_prefix: str = "\n\n"
    separator: str = "\n\n"

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "ChatTemplate":
        """Return the tokenizer's chat template; blank lines around messages if it has none.

        Raises:
            InputError: the template changes, repeats or drops messages.
        """
        if tokenizer.chat_template is None:
            return cls(_text_start(tokenizer))
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, PLACEHOLDERS, strict=True)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        parts = re.split("(\x02[abc]\x03)", text)
        if tuple(parts[1::2]) != PLACEHOLDERS:
            raise InputError(
                "the tokenizer's chat template must contain each message once, unchanged: pass "
                "template=ChatTemplate.plain(tokenizer), or --plain to tree-attention generate"
            )
        opening, _, next_prefix, answer_prefix = parts[::2]
        return cls(opening, answer_prefix, next_prefix)

    @classmethod
    def plain(cls, tokenizer: Any) -> "ChatTemplate":
        """Return a template that adds nothing but the token that starts every text, if the tokenizer has one."""
        return cls(_text_start(tokenizer), answer_prefix="")

    def prefix(self, *, started: bool, in_question: bool) -> str:
        """Return the text before what is read next: after text if `started`, inside a message if `in_question`."""
        if in_question:
            return ""
        return self.next_prefix if started else self.opening

    def question(self, prompt: str, *, started: bool, in_question: bool) -> str:
        """Return a question with the text around it; arguments as in `prefix`. An empty one adds no separator."""
        before = self.separator if in_question and prompt else self.prefix(started=started, in_question=in_question)
        return before + prompt + self.answer_prefix


def _text_start(tokenizer: Any) -> str:
    return tokenizer.decode(tokenizer("").input_ids[:1])
