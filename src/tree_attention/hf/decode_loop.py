"""`DecodeLoop`: the loop over tokens of `Session.ask`. On GPUs it launches the next step before it reads a token."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from ..errors import Unsupported
from .cache import TreeCache
from .inputs import CACHE


class DecodeLoop:
    """The argument `custom_generate` of `model.generate`, for one row. The tokens are those of transformers' own loop.

    That one reads each token on the host, and a GPU waits for the next launch meanwhile. This one launches the next
    step first. It learns one step late that the text has ended; then the cache takes that step back.

    Args:
        streamer: gets the prompt, then each token as int64 `[1]`, all on the CPU. Do not pass it to `generate`, too.
        runs_ahead: launch steps ahead. Default: on GPUs, if the cache can take a step back.
    """

    def __init__(self, streamer: Any, *, runs_ahead: bool | None = None) -> None:
        self.streamer, self.runs_ahead = streamer, runs_ahead

    def __call__(self, model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Any:
        """Return ids `[1, prompt + new]`; with `return_dict_in_generate` what transformers returns."""
        mode = generation_config.get_generation_mode()
        if GENERATION_MODES_MAPPING[mode] != "_sample":
            raise Unsupported(f"Session.ask chooses or samples token by token, not by {mode.value}: use model.generate")
        self.streamer.put(input_ids.cpu())
        text, cache = _Text(model, input_ids, generation_config, **kwargs), kwargs.get(CACHE)
        runs_ahead = input_ids.is_cuda if self.runs_ahead is None else self.runs_ahead
        with model._optimize_model_for_decode():
            while True:
                chosen = _ToHost(*text.choose())
                is_ahead = runs_ahead and not text.is_full and isinstance(cache, TreeCache) and cache.can_take_back()
                if is_ahead:
                    text.feed()
                token, has_ended = chosen.read()
                self.streamer.put(token)
                if has_ended:
                    break
                if not is_ahead:
                    text.feed()
        if is_ahead:
            cast(TreeCache, cache).take_back()
        self.streamer.end()
        return text.result()


class _Text:
    """The text so far, and the logits of its next token. As transformers' `_sample`, but never waits for the GPU."""

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
        self._take(model._prefill(input_ids, generation_config, model_kwargs))

    @property
    def is_full(self) -> bool:
        """True if the limit of tokens has been reached."""
        return self.ids.shape[1] >= self.config.max_length

    def choose(self) -> tuple[Tensor, Tensor]:
        """Append the next token; return it, int64 `[1]`, and whether it ends the text, bool `[1]`."""
        scores = self.logits_processor(self.ids, self._next)
        token = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.config.do_sample else scores.argmax(-1)
        if self.config.return_dict_in_generate and self.config.output_scores:
            self.scores += (scores,)
        if self.config.return_dict_in_generate and self.config.output_logits:
            self.logits += (self._next,)
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        return token, self.stopping_criteria(self.ids, self.scores or None)

    def feed(self) -> None:
        """Run the model on the last token."""
        length = 1 if self.kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=length, **self.kwargs)
        self._take(self.model(**inputs, return_dict=True))

    def _take(self, outputs: Any) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self._next = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)

    def result(self) -> Any:
        if not self.config.return_dict_in_generate:
            return self.ids
        fields: dict[str, Any] = {
            "sequences": self.ids,
            CACHE: self.kwargs.get(CACHE),
            "scores": self.scores or None,
            "logits": self.logits or None,
        }
        return GenerateDecoderOnlyOutput(**fields)


class _ToHost:
    """A token, and whether it ends the text, on their way to the host while the device goes on."""

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
