"""`DecodeLoop`: the loop over tokens of `Session.ask`. On GPUs it launches the next step before it reads a token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from ..errors import Unsupported
from .cache import TreeCache
from .inputs import CACHE
from .lookup import Lookup


class DecodeLoop:
    """The argument `custom_generate` of `model.generate`, for one row. The tokens are those of transformers' own loop.

    That one runs the model once per token, and reads each token on the host while the GPU waits for the next launch.
    This one feeds guesses along with the last token (`Lookup`), and keeps those that the model chooses itself. Where it
    has no guess, it launches the next step before it reads the token, and learns one step late that the text has ended.
    The cache takes back tokens that were fed and are not part of the text.

    Args:
        streamer: gets the prompt, then each token as int64 `[1]`, all on the CPU. Do not pass it to `generate`, too.
        lookup: called with the prompt's ids `[n]`, returns what guesses tokens; None for no guesses. There are none
            either if the cache cannot take tokens back.
        runs_ahead: launch steps ahead. Default: on GPUs, if the cache can take tokens back.

    Attributes:
        steps: forward passes whose logits were used.
    """

    def __init__(
        self, streamer: Any, lookup: Callable[[Tensor], Lookup] | None = Lookup, *, runs_ahead: bool | None = None
    ) -> None:
        self.streamer, self.lookup, self.runs_ahead, self.steps = streamer, lookup, runs_ahead, 0

    def __call__(self, model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Any:
        """Return ids `[1, prompt + new]`; with `return_dict_in_generate` what transformers returns."""
        mode = generation_config.get_generation_mode()
        if GENERATION_MODES_MAPPING[mode] != "_sample":
            raise Unsupported(f"Session.ask chooses or samples token by token, not by {mode.value}: use model.generate")
        self.streamer.put(input_ids.cpu())
        cache: Any = kwargs.get(CACHE)
        text = _Text(model, input_ids, generation_config, **kwargs)
        lookup = None if self.lookup is None else self.lookup(input_ids[0])
        runs_ahead = input_ids.is_cuda if self.runs_ahead is None else self.runs_ahead
        guesses: list[int] = []  # that were fed with the last token
        with model._optimize_model_for_decode():
            while True:
                is_ahead = (
                    runs_ahead and not guesses and text.room > 0 and not _guess(lookup, text) and _can_take_back(cache)
                )
                right, has_ended = self._choose(text, lookup, guesses, is_ahead)
                surplus = len(guesses) - right + (is_ahead and has_ended)
                if surplus:
                    cache.take_back(surplus)
                if has_ended:
                    break
                if lookup is not None and guesses:
                    lookup.learn(len(guesses), right)
                guesses = []
                if not is_ahead:
                    guesses = _guess(lookup, text) if _can_take_back(cache) else []
                    text.feed(guesses)
        self.streamer.end()
        return text.result()

    def _choose(self, text: "_Text", lookup: Lookup | None, guesses: list[int], is_ahead: bool) -> tuple[int, bool]:
        """Append a token for each right guess, and one more. Return how many were right, and whether the text ends."""
        self.steps, right, has_ended = self.steps + 1, 0, False
        for right, guess in enumerate([*guesses, -1]):
            chosen = _ToHost(*text.choose(right))
            if is_ahead:
                text.feed([])
            token, has_ended = chosen.read()
            self.streamer.put(token)
            if lookup is not None:
                lookup.add(int(token))
            if has_ended or int(token) != guess:
                break
        return right, has_ended


def _can_take_back(cache: Any) -> bool:
    return isinstance(cache, TreeCache) and cache.can_take_back()


def _guess(lookup: Lookup | None, text: "_Text") -> list[int]:
    return [] if lookup is None else lookup.guess(text.room)


class _Text:
    """The text so far, and the logits of its next tokens. As transformers' `_sample`, but never waits for the GPU."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        generation_config: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        **model_kwargs: Any,
    ) -> None:
        self.model, self.ids, self.config = model, input_ids, generation_config
        self.logits_processor, self.stopping_criteria, self.kwargs = logits_processor, stopping_criteria, model_kwargs
        self.scores: tuple[Tensor, ...] = ()
        self.logits: tuple[Tensor, ...] = ()
        self._outputs = model._prefill(input_ids, generation_config, model_kwargs)
        self._first = -1  # row of the last forward pass from which the first token is chosen

    @property
    def room(self) -> int:
        """Number of guesses that may follow the last token: the last token of a full text is not fed."""
        return self.config.max_length - 1 - self.ids.shape[1]

    def choose(self, row: int) -> tuple[Tensor, Tensor]:
        """Append the token of a row of the logits; return it, int64 `[1]`, and whether it ends the text, bool `[1]`."""
        logits = self._outputs.logits[:, self._first + row].to(copy=True, dtype=torch.float32)
        scores = self.logits_processor(self.ids, logits)
        token = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.config.do_sample else scores.argmax(-1)
        if self.config.return_dict_in_generate and self.config.output_scores:
            self.scores += (scores,)
        if self.config.return_dict_in_generate and self.config.output_logits:
            self.logits += (logits,)
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        self.kwargs = self.model._update_model_kwargs_for_generation(self._outputs, self.kwargs)
        return token, self.stopping_criteria(self.ids, self.scores or None)

    def feed(self, guesses: list[int]) -> None:
        """Run the model on the last token, and on guesses of those that follow."""
        ids, kwargs, count = self.ids, self.kwargs, len(guesses)
        if guesses:
            ids = torch.cat([ids, torch.tensor([guesses]).to(ids)], 1)
            kwargs = self.model._update_model_kwargs_for_generation(self._outputs, dict(kwargs), num_new_tokens=count)
            if "logits_to_keep" in kwargs:
                kwargs["logits_to_keep"] = count + 1
        length = count + 1 if kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=length, **kwargs)
        self._outputs, self._first = self.model(**inputs, return_dict=True), -1 - count

    def result(self) -> Any:
        if not self.config.return_dict_in_generate:
            return self.ids
        fields: dict[str, Any] = {"scores": self.scores or None, "logits": self.logits or None}
        return GenerateDecoderOnlyOutput(**fields | {"sequences": self.ids, CACHE: self.kwargs.get(CACHE)})


class _ToHost:
    """A token, and whether it ends the text, on their way to the host while the GPU goes on."""

    def __init__(self, token: Tensor, has_ended: Tensor) -> None:
        self._pair = torch.stack([token, has_ended.to(token)])
        self._arrived = None
        if self._pair.is_cuda:
            on_device, self._pair = self._pair, torch.empty(self._pair.shape, dtype=torch.long, pin_memory=True)
            self._pair.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[Tensor, bool]:
        """Wait until they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._pair[0], bool(self._pair[1])
