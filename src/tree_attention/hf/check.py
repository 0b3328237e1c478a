"""`check_model`: does a model give the same logits with a cache over ranks as in one process? Each way is tried."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import InputError, TreeAttentionError
from ..group import Group, gather_values
from .cache import TreeCache
from .inputs import CACHE
from .parallel_prefill import prefill
from .step import install_step
from .tensor_parallel import sequence_axis

READINGS = ("whole", "chunked", "prefill")
WRITINGS = ("growing", "static")
WRITTEN_TOKENS = 8
BLOCK_TOKENS = 4  # so that a short text reaches all ranks
FLOAT32_FLOOR = 2e-5  # of the largest logit, for the rounding of the merge: 7e-7 measured on our tests' architectures
ROUNDINGS = 4  # how many times what transformers' own ways of reading differ by


class Departure(NamedTuple):
    """How far logits are from those of one process.

    Attributes:
        difference: the largest difference of a logit.
        allowed: what the dtype's rounding explains: a few times the difference between two ways of transformers' own to
            read the same text.
        token: the first token whose logits differ by more, or None.
    """

    difference: float
    allowed: float
    token: int | None

    @classmethod
    def of(cls, ours: Tensor, stock: Tensor, again: Tensor, dtype: torch.dtype) -> "Departure":
        """Compare logits `[n, vocabulary]`: ours, those of one process, and those that it gives by another way.

        dtype: the model's; the logits may have been widened.
        """
        ours, stock, again = (logits.double() for logits in (ours, stock, again))
        floor = max(FLOAT32_FLOOR, 2 * torch.finfo(dtype).eps) * float(stock.abs().max())
        allowed = max(floor, ROUNDINGS * float((again - stock).abs().max()))
        by_token = (ours - stock).abs().amax(-1).nan_to_num(torch.inf)
        beyond = (by_token > allowed).nonzero().flatten()
        return cls(float(by_token.max()), allowed, int(beyond[0]) if len(beyond) else None)


@dataclass(frozen=True)
class CheckedWay:
    """One way to read and write with a TreeCache, and what came of it.

    Attributes:
        reading: "whole", in one forward pass; "chunked", in several; "prefill", by `tree_attention.hf.prefill`.
        writing: "growing", a cache whose buffers grow; "static", one with `max_tokens`.
        departure: from one process; None if the way was refused.
        refusal: the text of the error that refused it, or None.
    """

    reading: str
    writing: str
    departure: Departure | None = None
    refusal: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.departure is not None and self.departure.token is None

    def __str__(self) -> str:
        if self.departure is None:
            return f"refused: {self.refusal}"
        found = f"logits differ by {self.departure.difference:.1e}, rounding explains {self.departure.allowed:.1e}"
        return f"exact: {found}" if self.is_exact else f"departs at token {self.departure.token}: {found}"


@torch.no_grad()
def check_model(
    model: Any, tokenizer: Any = None, group: Group = None, *, text: str | Tensor | None = None, tokens: int = 96
) -> list[CheckedWay]:
    """Compare a model's logits over ranks with those of one process, for each way to read and to write.

    A short text is read, and 8 more tokens are fed one by one. All ranks call it together; each also runs the model
    with transformers' own attention and cache. One process checks the ways alone, without the exchange between ranks.

    Args:
        model: loaded with attn_implementation="tree_attention", in evaluation mode.
        tokenizer: for a `text` that is a string.
        group: as in `TreeCache`. Default: the sequence axis of `load_tensor_parallel`, or all ranks.
        text: what to read: a string, or token ids `[n]`. Default: random tokens, the same on every rank.
        tokens: number of tokens of the text to use, at least 16. More than a window of the model has checks it, too.

    Returns:
        The ways, the same list on every rank: of each the largest departure of a rank.

    Raises:
        InputError: the model has another attention implementation, or the text is shorter than 16 tokens.
    """
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation != "tree_attention":
        raise InputError(f"model must be loaded with attn_implementation='tree_attention', got {implementation!r}")
    ids = _ids(model, tokenizer, text, tokens)
    group = sequence_axis(model) if group is None else group
    stock, again = _stock_logits(model, ids)
    ways = []
    for reading, writing in itertools.product(READINGS, WRITINGS):
        try:
            cache = _cache(model, group, ids.shape[1] if writing == "static" else None)
            ours = _our_logits(model, ids, cache, reading)
            departure = Departure.of(ours, stock[-len(ours) :], again[-len(ours) :], model.dtype)
            everyones = [Departure(*each) for each in gather_values(departure, cache.ranks.group)]
            largest = max(everyones, key=lambda each: each.difference / each.allowed)
            ways.append(CheckedWay(reading, writing, largest))
        except TreeAttentionError as error:  # raised on every rank alike
            ways.append(CheckedWay(reading, writing, refusal=str(error)))
    return ways


def stock_implementation(model: Any) -> str:
    """Return transformers' own attention that a model has: Gemma 2 and GPT-OSS have no sdpa."""
    return "sdpa" if model._supports_sdpa else "eager"


def feed(model: Any, ids: Tensor, cache: Any, stops: list[int]) -> Tensor:
    """Feed the tokens that the cache lacks, up to each of `stops`; return their logits `[n, vocabulary]`."""
    logits = []
    for start, stop in itertools.pairwise([cache.get_seq_length(), *stops]):
        if start < stop:
            positions = torch.arange(start, stop, device=ids.device)[None]
            inputs = {"input_ids": ids[:, start:stop], "position_ids": positions}
            inputs["attention_mask"] = torch.ones_like(ids[:, :stop])
            logits.append(model(**inputs, use_cache=True, **{CACHE: cache}).logits[0])
    return torch.cat(logits)


def one_by_one(start: int, stop: int) -> list[int]:
    """The `stops` of `feed` for tokens `start` to `stop - 1`, each in a forward pass of its own."""
    return list(range(start + 1, stop + 1))


def _ids(model: Any, tokenizer: Any, text: str | Tensor | None, tokens: int) -> Tensor:
    """Return token ids `[1, n]` on the device."""
    config = model.config.get_text_config(decoder=True)
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("text must be token ids without a tokenizer, got a string: pass tokenizer=")
        text = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
    if text is None:  # no token that stands for an image, or ends a text
        named = {**vars(model.config), **vars(config)}.items()
        special = {value for name, value in named if name.endswith("token_id") and isinstance(value, int)}
        plain = torch.tensor([token for token in range(config.vocab_size) if token not in special])
        text = plain[torch.randint(len(plain), (tokens,), generator=torch.Generator().manual_seed(0))]
    if min(len(text), tokens) < 2 * WRITTEN_TOKENS:
        raise InputError(f"the text must have at least {2 * WRITTEN_TOKENS} tokens, got {min(len(text), tokens)}")
    return text[None, :tokens].to(model.device)


def _stock_logits(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all tokens with transformers' attention: read at once, and with the last tokens fed one by one."""
    count = ids.shape[1]
    with _attention(model, stock_implementation(model)):
        at_once = feed(model, ids, DynamicCache(config=model.config.get_text_config(decoder=True)), [count])
    with _attention(model, "eager"):
        stops = [count // 2, *one_by_one(count - WRITTEN_TOKENS - 1, count)]
        in_steps = feed(model, ids, DynamicCache(config=model.config.get_text_config(decoder=True)), stops)
    return at_once, in_steps


@contextlib.contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation("tree_attention")


def _cache(model: Any, group: Group, max_tokens: int | None) -> TreeCache:
    return TreeCache(model.config, group, block_tokens=BLOCK_TOKENS, max_tokens=max_tokens)


def _our_logits(model: Any, ids: Tensor, cache: TreeCache, reading: str) -> Tensor:
    """Logits of the tokens that are not fed by `prefill`."""
    count, read = ids.shape[1], ids.shape[1] - WRITTEN_TOKENS
    stops = {"whole": [read], "chunked": [read // 3, read // 2, read], "prefill": [read]}[reading]
    if reading == "prefill":
        prefill(model, ids[:, :read], cache, chunk_tokens=2 * cache.ranks.layout.cycle)
    if cache.ranks.max_tokens is not None:
        install_step(model)  # as `generate` does
    return feed(model, ids, cache, [*stops, *one_by_one(read, count)])
