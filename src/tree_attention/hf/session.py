"""`Session`: read a long text once, ask it questions, put it away, take it up again on another number of ranks."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import TextIteratorStreamer

from ..errors import InputError, Unsupported
from ..group import Group, first_fault, resolve_group
from ..reduce import TwoLevel
from .cache import TreeCache
from .layer_state import copy_cache, restore_on_error
from .layers import ShardedLayer
from .parallel_prefill import can_prefill, prefill
from .save import check_model, describe, load_cache, read_manifest, save_cache
from .tensor_parallel import check_axes, sequence_axis, tensor_group, tensor_ranks
from .window_layer import ReplicatedWindowLayer

MAX_NEW_TOKENS = 512
STATE_CHUNK_TOKENS = 4096  # of one forward pass that every rank makes alike
MARKS = ("\x02a\x03", "\x02b\x03", "\x02c\x03")  # stand for messages while the chat template is taken apart


@dataclass(frozen=True)
class Frame:
    """What a chat template puts before the first message, between question and answer, and before the next question."""

    opening: str = ""
    answer: str = "\n\n"
    question: str = "\n\n"


class Session:
    """A text in a cache that is spread over ranks, and a conversation about it. All ranks make the same calls.

    Made by `open` or `load`. `tokens` is int64 `[1, n]` on the model's device: everything that was read and written. A
    call that raises leaves the session as it was.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: TreeCache, tokens: Tensor, *, in_question: bool) -> None:
        self.model, self.tokenizer, self.cache, self.tokens = model, tokenizer, cache, tokens
        self.in_question = in_question  # the last word is the reader's, and no answer was asked for yet
        self.frame = frame_of(tokenizer)
        self.answer: tuple[threading.Thread, dict[str, Any]] | None = None  # being written, and what comes of it

    @classmethod
    def open(
        cls,
        model: Any,
        tokenizer: Any,
        group: Group | TwoLevel = None,
        *,
        max_tokens: int | None = None,
        **options: Any,
    ) -> "Session":
        """A session that has read nothing.

        Args:
            model: loaded with attn_implementation="tree_attention", on this rank's device.
            tokenizer: the model's.
            group, max_tokens, options: of the TreeCache; no group: the sequence axis of `load_tensor_parallel`, or all.
        """
        group = sequence_axis(model) if group is None else group
        cache = TreeCache(model.config, group, max_tokens=max_tokens, **options)
        nothing = torch.empty((1, 0), dtype=torch.long, device=model.device)
        return cls(model, tokenizer, cache, nothing, in_question=False)

    def read(
        self, text: str | Tensor, *, chunk_tokens: int | None = None, on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Take in a text, or tokens `[n]`, as (part of) the next message of the reader's.

        chunk_tokens, on_progress: of `prefill`. The last tokens may stay unread until the next call: `ask` reads them.
        Layers that carry a state along the sequence (linear attention) are read on every rank alike.
        """
        self._finish()
        parts = [self._encoded(self._before()), self._encoded(text)]
        tokens = torch.cat([self.tokens, *parts], 1)
        self.cache.ranks.check_capacity(tokens.shape[1])
        with restore_on_error(self.cache):
            self._feed(tokens, chunk_tokens, on_progress)
        self.tokens, self.in_question = tokens, True

    def ask(self, prompt: str, *, max_new_tokens: int | None = None, **how: Any) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; how: as in `model.generate`.

        Whoever stops early waits until the answer is written, and it is kept whole: ranks need not stop together. Where
        the iterator is neither run to its end nor closed, the session's next call waits. `tokens` has question and
        answer from then on.

        max_new_tokens: by default what generation_config= says, or 512.
        """
        self._finish()
        configured: int | None = getattr(how.get("generation_config"), "max_new_tokens", None)
        if max_new_tokens is None:
            max_new_tokens = configured or MAX_NEW_TOKENS
        if max_new_tokens != configured:
            how["max_new_tokens"] = max_new_tokens
        before = "\n\n" if self.in_question else self._before()
        tokens = torch.cat([self.tokens, self._encoded(before + prompt + self.frame.answer)], 1)
        self.cache.ranks.check_capacity(tokens.shape[1] + max_new_tokens - 1)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        outcome: dict[str, Any] = {}

        def write() -> None:
            try:
                outcome["tokens"] = self._answered(tokens, streamer, how)
            except BaseException as error:
                outcome["error"] = error
                streamer.on_finalized_text("", stream_end=True)

        writer = threading.Thread(target=write)
        writer.start()
        self.answer = mine = writer, outcome
        try:
            yield from streamer
        finally:
            if self.answer is mine:
                self._finish()

    @torch.inference_mode(False)
    def fork(self) -> "Session":
        """A second session that goes on from here by itself; its cache is a copy."""
        self._finish()
        cache = copy_cache(self.cache)
        return Session(self.model, self.tokenizer, cache, self.tokens.clone(), in_question=self.in_question)

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens; what comes next is a new message, unless there were none to forget.

        Raises InputError for more tokens than there are, Unsupported for a model that cannot forget (linear attention;
        a window that has moved on).
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
        """Write everything to a folder that all ranks see; what `load` needs besides is the model. See save.py."""
        self._finish()
        about = {"model": describe(self.model), "tokens": self.tokens[0].tolist(), "in_question": self.in_question}
        save_cache(self.cache, Path(folder), about, tensor=tensor_group(self.model))

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls, folder: str | Path, model: Any, tokenizer: Any, group: Group | TwoLevel = None, *,
        max_tokens: int | None = None, **options: Any,
    ) -> "Session":  # fmt: skip
        """Take up a saved session, on any number of ranks; arguments as in `open`.

        Raises InputError: no save there, one that was damaged, or of another model, dtype or version, or split over
        another number of ranks by tensor parallelism.
        """
        group = sequence_axis(model) if group is None else group
        sequence = group.group if isinstance(group, TwoLevel) else resolve_group(group)
        manifest = _manifest(Path(folder), model, [sequence, tensor_group(model)])
        cache = TreeCache(model.config, group, max_tokens=max_tokens, **options)
        load_cache(cache, Path(folder), manifest, model.device, tensor=tensor_group(model))
        about = manifest["about"]
        tokens = torch.tensor([about["tokens"]], dtype=torch.long, device=model.device)
        return cls(model, tokenizer, cache, tokens, in_question=about["in_question"])

    # Not in inference mode, whatever the caller's: what is kept then could only be written to in that mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _feed(
        self, tokens: Tensor, chunk_tokens: int | None = None, on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Read all but the last tokens."""
        if can_prefill(self.cache):
            prefill(self.model, tokens, self.cache, chunk_tokens=chunk_tokens, on_progress=on_progress)
            return
        check_axes(self.model, self.cache.ranks.group)
        if chunk_tokens is not None and chunk_tokens < 1:
            raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        done, last, chunk_tokens = self.cache.get_seq_length(), tokens.shape[1] - 1, chunk_tokens or STATE_CHUNK_TOKENS
        self.cache.reserve(last)
        for start in range(done, last, chunk_tokens):
            stop = min(start + chunk_tokens, last)
            positions = torch.arange(start, stop, device=tokens.device)[None]
            self.model.base_model(
                input_ids=tokens[:, start:stop], position_ids=positions, past_key_values=self.cache, use_cache=True
            )
            if on_progress is not None:
                on_progress(stop)

    def _answered(self, tokens: Tensor, streamer: TextIteratorStreamer, how: dict[str, Any]) -> Tensor:
        """The text with its answer, which the streamer is given as it is written; in a thread of its own."""
        if tokens.is_cuda:
            torch.cuda.set_device(tokens.device)  # the current device is a thread's own
        with restore_on_error(self.cache):
            self._feed(tokens)
            written = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), past_key_values=self.cache, streamer=streamer, **how
            )
        written = getattr(written, "sequences", written)  # with return_dict_in_generate
        configured = getattr(how.get("generation_config"), "eos_token_id", None)
        ends = self.model.generation_config.eos_token_id if configured is None else configured
        ends = how.get("eos_token_id", ends)
        ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        ended = int(written[0, -1]) in ends and written.shape[1] > tokens.shape[1]
        return written[:, : written.shape[1] - ended]  # the template ends an answer itself

    def _finish(self) -> None:
        """Wait for the answer that is being written, if any, and keep it; raises what it raised."""
        if self.answer is None:
            return
        writer, outcome = self.answer
        if writer is threading.current_thread():  # where an `ask` that nobody runs any more may be collected
            return
        writer.join()
        self.answer = None
        if "error" in outcome:
            raise outcome["error"]
        self.tokens, self.in_question = outcome["tokens"], False

    def _before(self) -> str:
        """What stands before a message of the reader's."""
        if self.in_question:
            return ""
        return self.frame.question if self.tokens.shape[1] else self.frame.opening

    def _encoded(self, text: str | Tensor) -> Tensor:
        """`[1, n]`, on the device."""
        if isinstance(text, str):
            text = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
        return text.to(self.tokens)[None]


def _manifest(folder: Path, model: Any, groups: list[ProcessGroup | None]) -> dict[str, Any]:
    """Of a save of this model, read by all ranks of both axes together, which raise together: one may see no folder."""
    here, manifest, fault = describe(model), {}, None
    try:
        manifest = read_manifest(folder)
        saved, split = manifest["tensor_ranks"], tensor_ranks(model.config)
        if saved != split:
            raise InputError(
                f"the save in {folder} is of a model split over {saved} ranks by tensor parallelism, and holds their "
                f"heads apart; this one is split over {split}: load the model over {saved}"
            )
        check_model(manifest["about"]["model"], here, folder)
    except InputError as error:
        fault = str(error)
    for group in groups:
        fault = first_fault(fault, group)
    if fault:
        raise InputError(fault)
    return manifest


def frame_of(tokenizer: Any) -> Frame:
    """The chat template's own words around messages; blank lines if the tokenizer has none."""
    if tokenizer.chat_template is None:
        return Frame(tokenizer.decode(tokenizer("").input_ids[:1]))  # what it starts every text with, if anything
    first, second, third = MARKS
    messages = [
        {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), MARKS, strict=True)
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    opening, rest = text.split(first)
    _, rest = rest.split(second)
    question, answer = rest.split(third)
    return Frame(opening, answer, question)
