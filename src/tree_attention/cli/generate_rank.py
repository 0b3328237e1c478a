"""What each rank of `tree-attention generate` does: read, write, time both, and compare if asked for."""

import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, TextStreamer

from ..errors import InputError
from ..group import gather_objects
from ..hf import TreeCache, can_prefill, prefill
from ..hf.parallel_prefill import CHUNK_TOKENS
from .exits import say
from .generate import Request
from .inputs import check_positions, load_model, prompt_ids, random_ids, reading_bar, sequence_ranks, step_of


def generate(request: Request, document: str, device: torch.device) -> int:
    """Load, read and write; only the first rank prints. Returns the exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rank, size = dist.get_rank(), dist.get_world_size()
    step = step_of(request.compiled, device)
    model = load_model(
        request.model or str(request.config), request.dtype, device, random=request.random_weights,
        tensor_parallel=request.tensor_parallel,
    )  # fmt: skip
    if request.model is None:
        tokenizer, input_ids = None, random_ids(model.config, request.max_prompt_tokens or 1, request.seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(request.model)
        limit = request.max_prompt_tokens
        input_ids = prompt_ids(tokenizer, document, request.prompt, plain=request.plain, limit=limit)
    if not request.extrapolate:
        check_positions(model.config, input_ids.shape[1], request.max_new_tokens)
    input_ids = input_ids.to(device)
    sharing = size // request.tensor_parallel
    if sharing > -(-input_ids.shape[1] // request.block_tokens):
        raise InputError(
            f"nproc must be at most the prompt's blocks, got {sharing} ranks for {input_ids.shape[1]} tokens in blocks "
            f"of {request.block_tokens}: start fewer ranks, or lower block-tokens"
        )
    tokens, on_cuda = input_ids.shape[1] + request.max_new_tokens, device.type == "cuda"
    cache = TreeCache(
        model.config, sequence_ranks(model), block_tokens=request.block_tokens,
        max_tokens=tokens if on_cuda else None, step=step,
    )  # fmt: skip
    cache.reserve(tokens)
    dist.barrier()
    run = _generate(request, model, tokenizer, input_ids, cache)
    figures = _figures(request, run, cache, input_ids.shape[1], size, device)
    dist.destroy_process_group()
    if rank:
        return 0
    if request.verify:
        torch.set_num_threads(os.cpu_count() or 1)
        if request.tensor_parallel != 1:  # this rank has a part of the weights
            model = cache = None
            model = load_model(str(request.model), request.dtype, device)
        figures["verify"] = _verify(request, model, tokenizer, input_ids, run.tokens)
    _report(figures)
    if request.as_json:
        say(json.dumps(figures) + "\n")
    return 0 if figures.get("verify", {}).get("identical", True) else 1


@dataclass
class _Run:
    """What happened, with the clock of this rank."""

    started_s: float = field(default_factory=time.perf_counter)
    token_s: list[float] = field(default_factory=list)
    received_bytes: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class _Clock(TextStreamer):
    """Notes when each token came; the first rank's also prints it."""

    def __init__(self, tokenizer: Any, run: _Run, cache: TreeCache, prints: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.run, self.cache, self.prints = run, cache, prints

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.run.token_s.append(time.perf_counter())
            self.run.received_bytes.append(self.cache.received_bytes)
        if self.tokenizer is None:
            self.next_tokens_are_prompt = False
        else:
            super().put(value)

    def end(self) -> None:
        if self.tokenizer is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.prints:
            say(text + ("\n" if stream_end else ""))


def _generate(request: Request, model: Any, tokenizer: Any, input_ids: Tensor, cache: TreeCache) -> _Run:
    run = _Run()
    first = dist.get_rank() == 0
    if can_prefill(cache):
        with reading_bar(input_ids.shape[1], shown=first) as on_progress:
            prefill(model, input_ids, cache, chunk_tokens=request.chunk_tokens, on_progress=on_progress)
        how = {}
    else:
        how = {"prefill_chunk_size": request.chunk_tokens or CHUNK_TOKENS["cpu"]}
    clock = _Clock(tokenizer, run, cache, prints=first)
    out = model.generate(
        input_ids, past_key_values=cache, attention_mask=torch.ones_like(input_ids), streamer=clock,
        **how, **_decoding(request),
    )  # fmt: skip
    run.tokens = out[0, input_ids.shape[1] :].tolist()
    return run


def _decoding(request: Request) -> dict[str, Any]:
    torch.manual_seed(request.seed)
    how: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "do_sample": request.sample}
    if request.random_weights:
        how |= {"eos_token_id": None}  # as many tokens as asked for
    if request.sample:
        return how | {"temperature": request.temperature}
    # None: what a model's generation_config says of sampling is not for us
    return how | dict.fromkeys(("temperature", "top_p", "top_k"))


def _figures(
    request: Request, run: _Run, cache: TreeCache, prompt_tokens: int, size: int, device: torch.device
) -> dict[str, Any]:
    """The summary; times are the slowest rank's."""
    steps = len(run.token_s) - 1
    times = torch.tensor([run.token_s[0] - run.started_s, (run.token_s[-1] - run.token_s[0]) / max(steps, 1)])
    times = times.to(device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return {
        "model": request.model or str(request.config), "random_weights": request.random_weights,
        "ranks": size, "tensor_parallel": request.tensor_parallel, "device": str(device.type),
        "prompt_tokens": prompt_tokens, "new_tokens": len(run.tokens),
        "ttft_s": float(times[0]), "tpot_s": float(times[1]) if steps else None,
        "kv_bytes_per_rank": gather_objects(cache.kv_bytes, dist.group.WORLD),
        "received_bytes_per_token": (run.received_bytes[-1] - run.received_bytes[0]) / steps if steps else None,
        "tokens": run.tokens,
    }  # fmt: skip


def _verify(request: Request, model: Any, tokenizer: Any, input_ids: Tensor, tokens: list[int]) -> dict[str, Any]:
    """The same on this process alone: transformers' own sdpa attention (or eager) and DynamicCache."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")  # Gemma 2 and GPT-OSS have none
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    out = model.generate(
        input_ids, past_key_values=cache, attention_mask=torch.ones_like(input_ids),
        prefill_chunk_size=request.chunk_tokens or CHUNK_TOKENS["cpu"], **_decoding(request),
    )  # fmt: skip
    expected = out[0, input_ids.shape[1] :].tolist()
    pairs = zip(tokens, expected, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(expected)))
    identical = tokens == expected
    return {"identical": identical, "first_difference": None if identical else first, "one_process_tokens": expected}


def _report(figures: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    megabytes = ", ".join(f"{b / 1e6:.1f}" for b in figures["kv_bytes_per_rank"])
    tpot, received = figures["tpot_s"], figures["received_bytes_per_token"]
    split = f", heads and weights over {figures['tensor_parallel']} of them" if figures["tensor_parallel"] > 1 else ""
    rows = {
        "read": f"{figures['prompt_tokens']} tokens on {figures['ranks']} ranks ({figures['device']}){split}",
        "first token": f"{figures['ttft_s']:.2f} s",
        "wrote": f"{figures['new_tokens']} tokens" + (f", {1e3 * tpot:.1f} ms each" if tpot else ""),
        "KV cache": f"{megabytes} MB a rank",
        "received": f"{received / 1e3:.1f} kB a token and rank" if received is not None else "nothing",
    }
    if figures["random_weights"]:
        rows["model"] = "random weights: the times count, the tokens mean nothing"
    if "verify" in figures:
        verdict = figures["verify"]
        rows["one process"] = (
            "writes the same tokens" if verdict["identical"] else f"differs from token {verdict['first_difference']} on"
        )
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    Console(stderr=True).print(table)
