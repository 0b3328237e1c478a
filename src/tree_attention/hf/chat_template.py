"""`ChatTemplate`: the text that a tokenizer's chat template puts around messages, as strings to concatenate."""

import re
from collections.abc import Sequence
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
        control_tokens: False: a control token that is spelled out within a message, such as `<|im_start|>`, is read as
            text, so a document cannot end its message. True: it is read as that token.
    """

    opening: str = ""
    answer_prefix: str = "\n\n"
    next_prefix: str = "\n\n"
    separator: str = "\n\n"
    control_tokens: bool = False

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "ChatTemplate":
        """Return the tokenizer's chat template; blank lines around messages if it has none.

        Raises:
            InputError: the template changes, repeats or drops messages, or refuses them.
        """
        if tokenizer.chat_template is None:
            return cls(_text_start(tokenizer))
        parts = _split(tokenizer, PLACEHOLDERS) or _split(
            tokenizer, [[{"type": "text", "text": text}] for text in PLACEHOLDERS]
        )
        if not parts:
            raise InputError(
                "the tokenizer's chat template must contain each message once, unchanged: pass "
                "template=ChatTemplate.plain(tokenizer), or --plain to tree-attention generate"
            )
        opening, _, next_prefix, answer_prefix = parts
        return cls(opening, answer_prefix, next_prefix)

    @classmethod
    def plain(cls, tokenizer: Any) -> "ChatTemplate":
        """Return a template that adds nothing but the token that starts every text, if the tokenizer has one.

        The text may have control tokens: with this template they are the caller's.
        """
        return cls(_text_start(tokenizer), answer_prefix="", control_tokens=True)

    def prefix(self, *, started: bool, in_question: bool) -> str:
        """Return the text before what is read next: after text if `started`, inside a message if `in_question`."""
        if in_question:
            return ""
        return self.next_prefix if started else self.opening

    def question(self, prompt: str, *, started: bool, in_question: bool) -> str:
        """Return a question with the text around it; arguments as in `prefix`. An empty one adds no separator."""
        return self._before(prompt, started, in_question) + prompt + self.answer_prefix

    def question_ids(self, tokenizer: Any, prompt: str, *, started: bool, in_question: bool) -> list[int]:
        """Return the token ids of `question`."""
        if self.control_tokens or not _has_control_token(tokenizer, prompt):
            question = self.question(prompt, started=started, in_question=in_question)
            return tokenizer(question, add_special_tokens=False).input_ids if question else []
        texts = self._before(prompt, started, in_question), self.answer_prefix
        before, after = (tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in texts)
        return [*before, *self.message_ids(tokenizer, prompt), *after]

    def message_ids(self, tokenizer: Any, text: str) -> list[int]:
        """Return the token ids of a text within a message."""
        how = {}
        if not self.control_tokens and _has_control_token(tokenizer, text):
            how["split_special_tokens"] = True
        return tokenizer(text, add_special_tokens=False, **how).input_ids if text else []

    def _before(self, prompt: str, started: bool, in_question: bool) -> str:
        return self.separator if in_question and prompt else self.prefix(started=started, in_question=in_question)


def _split(tokenizer: Any, contents: Sequence[Any]) -> list[str]:
    """Return the text around three messages; [] unless the template contains each once, unchanged."""
    from jinja2 import TemplateError  # transformers needs it for chat templates

    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError):  # it takes content of another kind, or refuses such a conversation
        return []
    parts = re.split("(\x02[abc]\x03)", text)
    return parts[::2] if tuple(parts[1::2]) == PLACEHOLDERS else []


def _has_control_token(tokenizer: Any, text: str) -> bool:
    added = (token for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special)
    return any(token.content in text for token in added)


def _text_start(tokenizer: Any) -> str:
    return tokenizer.decode(tokenizer("").input_ids[:1])
