"""What each rank of `tree-attention generate` does: read, answer, time both, verify if asked to, and report."""

import json
import os
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from ..errors import InputError
from ..group import gather_objects
from ..hf import Session
from ..hf.chat_template import ChatTemplate
from ..hf.parallel_prefill import CHUNK_TOKENS
from .models import check_positions, check_step_mode, generate_kwargs, load_model, open_session
from .options import GenerateOptions
from .terminal import print_summary, reading_bar, say


def generate(options: GenerateOptions, document: str, device: torch.device) -> int:
    """Load, read and answer; only the first rank prints. Returns the exit code."""
    check_step_mode(options.compiled, device)
    is_first, name = dist.get_rank() == 0, options.model or str(options.config)
    model = load_model(
        name, options.dtype, device, random=options.random_weights, tensor_parallel=options.tensor_parallel
    )
    prompt = random_prompt(options, model.config) if options.random_weights else text_prompt(options, document)
    check_positions(options, model.config, prompt.tokens, options.max_new_tokens)
    max_tokens = prompt.tokens + options.max_new_tokens
    session = open_session(
        options, model, prompt.tokenizer, max_tokens if device.type == "cuda" else None, prompt.template
    )
    session.cache.reserve(max_tokens)
    dist.barrier()
    start_s, written = _answer(options, session, prompt)
    figures = _figures(options, start_s, written, session, prompt.tokens)
    input_ids = session.tokens[:, : prompt.tokens]
    dist.destroy_process_group()
    if not is_first:
        return 0
    if options.verify:
        del session
        torch.set_num_threads(os.cpu_count() or 1)
        if options.tensor_parallel != 1:  # this rank holds a part of the weights
            del model
            model = load_model(name, options.dtype, device)
        figures["verify"] = _verify(options, model, input_ids, figures["tokens"])
    _report(figures)
    if options.as_json:
        say(json.dumps(figures) + "\n")
    return 0 if figures.get("verify", {}).get("identical", True) else 1


@dataclass(frozen=True)
class Prompt:
    """What a session reads and is asked."""

    tokenizer: Any
    template: ChatTemplate
    text: Tensor  # token ids [n]
    question: str
    tokens: int  # number of tokens of text, question and template together


def text_prompt(options: GenerateOptions, document: str) -> Prompt:
    """Return the document and the question, the end of the document truncated to --max-prompt-tokens.

    Without a document, the prompt is the text and the question is empty.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    has_template = tokenizer.chat_template is not None and not options.plain
    template = ChatTemplate.from_tokenizer(tokenizer) if has_template else ChatTemplate.plain(tokenizer)
    text, question = (document, options.prompt) if document else (options.prompt, "")
    ids, before, after = (
        tokenizer(piece, add_special_tokens=False).input_ids
        for piece in (text, template.opening, template.question(question, started=True, in_question=True))
    )
    others, limit = len(before) + len(after), options.max_prompt_tokens
    least = others + (1 if document else len(ids))
    if limit is not None and limit < least:
        raise InputError(f"max-prompt-tokens must be at least {least} for this prompt, got {limit}")
    kept = ids if limit is None else ids[: limit - others]
    return Prompt(tokenizer, template, torch.tensor(kept), question, len(kept) + others)


def random_prompt(options: GenerateOptions, config: Any) -> Prompt:
    """Return --max-prompt-tokens random tokens, the same on every rank, and a tokenizer that knows no text."""

    class NoTokenizer:
        chat_template = None

        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=[])

        def decode(self, token_ids: list[int], **_: Any) -> str:
            return ""

    tokens, vocabulary = options.max_prompt_tokens or 1, config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(options.seed))
    return Prompt(NoTokenizer(), ChatTemplate("", "", "", ""), ids, "", tokens)


class _Written(NamedTuple):
    """A token of the answer: its id, this rank's clock, and the bytes received so far."""

    token: int
    time_s: float
    received_bytes: float


def _answer(options: GenerateOptions, session: Session, prompt: Prompt) -> tuple[float, list[_Written]]:
    """Read and answer. The first rank shows the bar and prints the answer. Returns the start time and the tokens."""
    is_first, written = dist.get_rank() == 0, []
    torch.manual_seed(options.seed)
    start_s = time.perf_counter()

    def on_token(token: int) -> None:
        written.append(_Written(token, time.perf_counter(), session.cache.received_bytes))

    with reading_bar(len(prompt.text), shown=is_first) as on_progress:
        session.read(prompt.text, chunk_tokens=options.chunk_tokens, on_progress=on_progress)
    for piece in session.ask(prompt.question, on_token=on_token, **generate_kwargs(options)):
        if is_first:
            say(piece)
    if is_first and not options.random_weights:
        say("\n")
    return start_s, written


def _figures(
    options: GenerateOptions, start_s: float, written: list[_Written], session: Session, prompt_tokens: int
) -> dict[str, Any]:
    """Return the results. Times are those of the slowest rank."""
    first, last, steps = written[0], written[-1], len(written) - 1
    times = torch.tensor([first.time_s - start_s, (last.time_s - first.time_s) / max(steps, 1)])
    times = times.to(session.tokens.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return {
        "model": options.model or str(options.config),
        "random_weights": options.random_weights,
        "ranks": dist.get_world_size(),
        "tensor_parallel": options.tensor_parallel,
        "device": times.device.type,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(written),
        "ttft_s": float(times[0]),
        "tpot_s": float(times[1]) if steps else None,
        "kv_bytes_per_rank": gather_objects(session.cache.kv_bytes, dist.group.WORLD),
        "received_bytes_per_token": (last.received_bytes - first.received_bytes) / steps if steps else None,
        "tokens": [each.token for each in written],
    }


def _verify(options: GenerateOptions, model: Any, input_ids: Tensor, tokens: list[int]) -> dict[str, Any]:
    """Compare with what this process alone generates: transformers' sdpa attention (or eager) and DynamicCache."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")  # Gemma 2 and GPT-OSS have no sdpa
    torch.manual_seed(options.seed)
    out = model.generate(
        input_ids,
        past_key_values=DynamicCache(config=model.config.get_text_config(decoder=True)),
        attention_mask=torch.ones_like(input_ids),
        prefill_chunk_size=options.chunk_tokens or CHUNK_TOKENS["cpu"],
        **generate_kwargs(options),
    )
    expected = out[0, input_ids.shape[1] :].tolist()
    pairs = zip(tokens, expected, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(expected)))
    identical = tokens == expected
    return {"identical": identical, "first_difference": None if identical else first, "one_process_tokens": expected}


def _report(figures: dict[str, Any]) -> None:
    megabytes = ", ".join(f"{nbytes / 1e6:.1f}" for nbytes in figures["kv_bytes_per_rank"])
    tpot, received = figures["tpot_s"], figures["received_bytes_per_token"]
    split = f", heads and weights over {figures['tensor_parallel']} of them" if figures["tensor_parallel"] > 1 else ""
    rows = {
        "read": f"{figures['prompt_tokens']} tokens on {figures['ranks']} ranks ({figures['device']}){split}",
        "first token": f"{figures['ttft_s']:.2f} s",
        "wrote": f"{figures['new_tokens']} tokens" + (f", {1e3 * tpot:.1f} ms each" if tpot else ""),
        "KV cache": f"{megabytes} MB per rank",
        "received": f"{received / 1e3:.1f} kB per token and rank" if received is not None else "nothing",
    }
    if figures["random_weights"]:
        rows["model"] = "random weights: the times count, the tokens mean nothing"
    if "verify" in figures:
        verdict = figures["verify"]
        same, differs = "writes the same tokens", f"differs from token {verdict['first_difference']} on"
        rows["one process"] = same if verdict["identical"] else differs
    print_summary(rows)
