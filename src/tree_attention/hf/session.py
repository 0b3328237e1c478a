"""`Session`: read a long text once, ask questions about it, save it, and load it on another number of ranks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from ..errors import InputError, Unsupported
from ..group import Group
from ..reduce import TwoLevel
from .answer import Answer, Listener
from .cache import TreeCache
from .calls import Call
from .chat_template import ChatTemplate
from .decode_loop import DecodeLoop
from .inputs import CACHE, check_ids
from .layer_state import copy_cache, restore_on_error
from .layers import ShardedLayer
from .lookup import Lookup
from .models import takes_positions
from .parallel_prefill import can_prefill, prefill, without_adapters
from .save import load_cache, save_cache
from .tensor_parallel import check_axes, sequence_axis
from .window_layer import ReplicatedWindowLayer

AnyGroup = Group | TwoLevel
MAX_NEW_TOKENS = 512
STATE_CHUNK_TOKENS = 4096  # per forward pass of a model that every rank reads in full


class Session:
    """A text in a cache that is spread over ranks, and a conversation about it. All ranks make the same calls.

    Create one with `open` or `load`. If a call raises, the session is as it was before the call.

    Attributes:
        tokens: int64 `[1, n]` on the model's device: everything that was read and written, apart from an answer that is
            still being written.
        steps: forward passes by which the last answer was written: fewer than its tokens if guesses were right.
        logits: `[new, vocabulary]` from which the last answer was chosen, if it was asked for with
            `output_logits=True, return_dict_in_generate=True`; else None.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: TreeCache, template: ChatTemplate) -> None:
        self.model, self.tokenizer, self.cache, self.template = model, tokenizer, cache, template
        self.tokens = torch.empty((1, 0), dtype=torch.long, device=model.device)
        self.in_question = False  # the last message is the user's and has no answer yet
        self.steps = 0
        self.logits: Tensor | None = None
        self.answer: Answer | None = None  # the last one, which may still be being written

    @classmethod
    def open(
        cls, model: Any, tokenizer: Any, group: AnyGroup = None, *, template: ChatTemplate | None = None, **kwargs: Any
    ) -> "Session":
        """Return a session that has read nothing.

        Args:
            model, tokenizer: the model loaded with attn_implementation="tree_attention", on this rank's device.
            group: as in `TreeCache`. Default: the sequence axis of `load_tensor_parallel`, or all ranks.
            template: the text around messages. Default: the tokenizer's chat template.
            kwargs: further arguments of `TreeCache`, such as `max_tokens`.
        """
        group = sequence_axis(model) if group is None else group
        cache = TreeCache(model.config, group, **kwargs)
        return cls(model, tokenizer, cache, ChatTemplate.from_tokenizer(tokenizer) if template is None else template)

    def read(self, text: str | Tensor, *, chunk_tokens: int | None = None, on_progress: Listener = None) -> None:
        """Read a text, or tokens `[n]`, as the next user message or a further part of it; options as in `prefill`.

        The last tokens may stay unread until the next call; `ask` reads them. Models with layers that carry a state
        along the sequence (linear attention), or that take no `position_ids`, are run in full on every rank.
        """
        self._finish()
        with self._restored_on_error(), Call("read", self.model, self.cache) as call:
            before = self.template.prefix(started=self.tokens.shape[1] > 0, in_question=self.in_question)
            prefix = self.tokenizer(before, add_special_tokens=False).input_ids if before else []
            tokens = torch.cat([self.tokens, self._row(prefix), self._message(text)], 1)
            self._start(call, tokens, tokens.shape[1], chunk_tokens=chunk_tokens)
            self._feed(tokens, chunk_tokens, on_progress)
        self.tokens, self.in_question = tokens, True

    def ask(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        lookup: bool | None = None,
        on_token: Listener = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Ask a question, and return an iterator over the text of the answer.

        A thread starts to write the answer before `ask` returns. It writes the whole answer, even if the iterator is
        closed early or never used, so ranks need not stop together. `close`, and every later call of the session, wait
        for the end. After that `tokens` contains the question and the answer. If generation fails, the error is raised
        by the last `next`, by `close` or by the next call, whichever comes first.

        Args:
            prompt: the question. May be empty if it was part of the text that was read.
            max_new_tokens: at least 1. Default: that of `generation_config=`, or 512.
            lookup: guess the next tokens from what followed the last ones earlier in the text, and check up to 15
                guesses in one step. The tokens are the same, also those drawn for a seed, except where the rounding of
                a larger step decides a near tie. Without guesses: models with linear attention, and models with windows
                unless the cache has `max_tokens`. Default: on the CPU.
            on_token: called in the thread with the id of each token of the answer as it is written.
            generate_kwargs: further arguments of `model.generate`.

        Raises:
            InputError: a static cache is too small for the question and `max_new_tokens`, or that is below 1.
        """
        self._finish()
        with Call("ask", self.model, self.cache) as call:
            configured: int | None = getattr(generate_kwargs.get("generation_config"), "max_new_tokens", None)
            if max_new_tokens is None:
                max_new_tokens = configured or MAX_NEW_TOKENS
            if max_new_tokens < 1:
                raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
            if max_new_tokens != configured:
                generate_kwargs["max_new_tokens"] = max_new_tokens
            tokens = torch.cat([self.tokens, self._question(prompt)], 1)
            lookup = self.model.device.type == "cpu" if lookup is None else lookup
            options = {"options": generate_kwargs, "lookup": lookup}
            self._start(call, tokens, tokens.shape[1] + max_new_tokens - 1, **options)
            call.keep_open()  # the thread ends it

        def keep(written: Tensor) -> None:
            self.tokens, self.in_question = written, False

        def generate(streamer: TextIteratorStreamer) -> Tensor:
            with self._restored_on_error(), call:
                call.result = self._generate(tokens, DecodeLoop(streamer, Lookup if lookup else None), generate_kwargs)
            return call.result

        self.answer = Answer(generate, self.tokenizer, keep, on_token)
        return self.answer

    def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens that `ask(prompt)` reads before it writes."""
        self._finish()
        return self._question(prompt).shape[1]

    @torch.inference_mode(False)
    def fork(self) -> "Session":
        """Return an independent session that continues from here, with a copy of the cache."""
        self._finish()
        session = Session(self.model, self.tokenizer, copy_cache(self.cache), self.template)
        session.tokens, session.in_question = self.tokens.clone(), self.in_question
        return session

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens. Unless `count` is 0, the next text starts a new message.

        Raises:
            InputError: `count` is negative or larger than the number of tokens.
            Unsupported: a layer cannot forget: linear attention, or a window that no longer starts at the first token.
        """
        self._finish()
        if not 0 <= count <= self.tokens.shape[1]:
            raise InputError(f"rewind takes 0 to {self.tokens.shape[1]} tokens, got {count}")
        length = self.tokens.shape[1] - count
        surplus = self.cache.get_seq_length() - length
        if surplus > 0:
            for layer in self.cache.layers:
                moved_on = isinstance(layer, ReplicatedWindowLayer) and layer.length >= layer.sliding_window
                if moved_on or not isinstance(layer, ShardedLayer | ReplicatedWindowLayer):
                    raise Unsupported(f"{type(layer).__name__} cannot forget tokens: load a save, or read again")
            self.cache.crop(-surplus)
        self.tokens = self.tokens[:, :length]
        self.in_question = self.in_question and count == 0

    def save(self, folder: str | Path) -> None:
        """Write the session, without the model, to a folder that all ranks see (format: save.py)."""
        self._finish()
        about = {"tokens": self.tokens[0].tolist(), "in_question": self.in_question}
        save_cache(self.cache, Path(folder), self.model, about)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, folder: str | Path, model: Any, tokenizer: Any, group: AnyGroup = None, **kwargs: Any) -> "Session":
        """Return a saved session, on any number of ranks. All arguments but `folder` are those of `open`.

        Raises:
            InputError: the folder holds no save; or a save that is damaged, of another version, model or dtype, or of
                a model split over another number of ranks by tensor parallelism.
        """
        session = cls.open(model, tokenizer, group, **kwargs)
        about = load_cache(session.cache, Path(folder), model)
        session.tokens = torch.tensor([about["tokens"]], dtype=torch.long, device=model.device)
        session.in_question = about["in_question"]
        return session

    def _start(self, call: Call, tokens: Tensor, length: int, **options: Any) -> None:
        """Start a call of all ranks that feeds `tokens`, and needs room for `length` of them."""
        self.cache.ranks.check_capacity(length)
        check_ids(self.model, tokens)
        call.described |= {"tokens": tokens, **options}
        call.start()

    @contextlib.contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        """If a call raises, which it then does on every rank, give the cache back what it held before."""
        was_usable = self.cache.exchange.failure is None
        try:
            with restore_on_error(self.cache):
                yield
        except BaseException:
            if was_usable:
                self.cache.exchange.recover()
            raise

    def _finish(self) -> None:
        """Wait for the answer that is being written, if any. Raise the error that ended it."""
        if self.answer is not None:
            self.answer.close()

    # Not in inference mode, whatever the caller's mode: tensors created in it could not be updated outside it later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _feed(self, tokens: Tensor, chunk_tokens: int | None = None, on_progress: Listener = None) -> None:
        """Read all but the last tokens: each rank its share, or if the model does not allow that, all of them."""
        model = without_adapters(self.model)
        has_positions = takes_positions(model)
        if can_prefill(self.cache) and has_positions:
            prefill(self.model, tokens, self.cache, chunk_tokens=chunk_tokens, on_progress=on_progress)
            return
        check_axes(self.model, self.cache.ranks.group)
        if chunk_tokens is not None and chunk_tokens < 1:
            raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        done, last, chunk_tokens = self.cache.get_seq_length(), tokens.shape[1] - 1, chunk_tokens or STATE_CHUNK_TOKENS
        self.cache.reserve(last)
        for start in range(done, last, chunk_tokens):
            stop = min(start + chunk_tokens, last)
            inputs = {"input_ids": tokens[:, start:stop], CACHE: self.cache}
            if has_positions:
                inputs["position_ids"] = torch.arange(start, stop, device=tokens.device)[None]
            model.base_model(**inputs, use_cache=True)
            if on_progress is not None:
                on_progress(stop)

    def _generate(self, tokens: Tensor, loop: DecodeLoop, generate_kwargs: dict[str, Any]) -> Tensor:
        """Return `tokens` followed by the answer, without the token that ends it: the template ends an answer."""
        if tokens.is_cuda:
            torch.cuda.set_device(tokens.device)  # every thread has its own current device
        self._feed(tokens)
        mask = torch.ones_like(tokens)
        how = {"attention_mask": mask, "custom_generate": loop, CACHE: self.cache}
        written = self.model.generate(tokens, **how, **generate_kwargs)
        self.steps = loop.steps
        logits = getattr(written, "logits", None)
        self.logits = None if logits is None else torch.cat(logits)
        written = getattr(written, "sequences", written)  # with return_dict_in_generate
        configured = getattr(generate_kwargs.get("generation_config"), "eos_token_id", None)
        ends = self.model.generation_config.eos_token_id if configured is None else configured
        ends = generate_kwargs.get("eos_token_id", ends)
        ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        ended = int(written[0, -1]) in ends and written.shape[1] > tokens.shape[1]
        return written[:, : written.shape[1] - ended]

    def _question(self, prompt: str) -> Tensor:
        """Return the token ids `[1, n]` of a question and the text around it."""
        started = self.tokens.shape[1] > 0
        ids = self.template.question_ids(self.tokenizer, prompt, started=started, in_question=self.in_question)
        return self._row(ids)

    def _message(self, text: str | Tensor) -> Tensor:
        return self._row(self.template.message_ids(self.tokenizer, text) if isinstance(text, str) else text)

    def _row(self, ids: list[int] | Tensor) -> Tensor:
        """Return token ids as int64 `[1, n]` on the device."""
        return torch.as_tensor(ids, dtype=torch.long).to(self.tokens)[None]
