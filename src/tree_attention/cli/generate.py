"""`tree-attention generate`: a document into a spread cache, an answer out of it, and the figures."""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

from ..errors import InputError
from ..hf import TreeCache, can_prefill, prefill
from .launch import run_on_ranks


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    model: str
    prompt: str
    file: Path | None
    max_new_tokens: int
    max_prompt_tokens: int | None
    plain: bool
    sample: bool
    temperature: float
    seed: int
    dtype: str
    device: str
    block_tokens: int
    chunk_tokens: int
    verify: bool
    as_json: bool


def generate_on_ranks(request: Request, nproc: int | None) -> int:
    """Check what needs no model, then start the ranks; returns the exit code."""
    document = _document(request.file)
    check_model_folder(request.model)
    if request.max_new_tokens < 1 or request.chunk_tokens < 1 or request.block_tokens < 1:
        raise InputError("max-new-tokens, chunk-tokens and block-tokens must be at least 1")
    if request.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be auto, float32, bfloat16 or float16, got {request.dtype!r}")
    return run_on_ranks(_on_rank, nproc, request.device, request, document)


def check_model_folder(model: str) -> None:
    """A path must be a folder with a model and a tokenizer; anything else is taken for a name on the hub."""
    folder = Path(model)
    if not folder.exists():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise InputError(f"model must be a folder or a name on the hub (owner/name), and {model!r} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {model} must hold a config.json: is it a transformers model?")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise InputError(f"model folder {model} has no tokenizer (tokenizer.json): save it there with save_pretrained")


def _document(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file {file} must be UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"file {file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"file {file} must hold text, and is empty")
    return text


def _on_rank(request: Request, document: str, device: torch.device) -> int:
    """What each rank does; only the first prints."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rank, size = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    model = _load(request, device)
    input_ids = _prompt_ids(request, tokenizer, document, model.config).to(device)
    if size > -(-input_ids.shape[1] // request.block_tokens):
        raise InputError(
            f"nproc must be at most the prompt's blocks, got {size} ranks for {input_ids.shape[1]} tokens in blocks "
            f"of {request.block_tokens}: start fewer ranks, or lower block-tokens"
        )
    cache = TreeCache(model.config, block_tokens=request.block_tokens)
    cache.reserve(input_ids.shape[1] + request.max_new_tokens)
    dist.barrier()
    run = _generate(request, model, tokenizer, input_ids, cache)
    figures = _figures(request, run, cache, input_ids.shape[1], size, device)
    dist.destroy_process_group()
    if rank:
        return 0
    if request.verify:
        torch.set_num_threads(os.cpu_count() or 1)
        figures["verify"] = _verify(request, model, tokenizer, input_ids, run.tokens)
    _report(figures)
    if request.as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()
    return 0 if figures.get("verify", {}).get("identical", True) else 1


def _load(request: Request, device: torch.device) -> Any:
    dtype = request.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            request.model, dtype=getattr(torch, dtype), attn_implementation="tree_attention"
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model {request.model} cannot be loaded: {error}") from None
    return model.to(device).eval()


def _prompt_ids(request: Request, tokenizer: Any, document: str, config: Any) -> Tensor:
    """`[1, tokens]`: the document, the question, and the chat template around them if the tokenizer has one."""

    def tokens(text: str) -> list[int]:
        whole = f"{text}\n\n{request.prompt}" if text else request.prompt
        if request.plain or tokenizer.chat_template is None:
            return tokenizer(whole).input_ids
        message = [{"role": "user", "content": whole}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    ids, limit = tokens(document), request.max_prompt_tokens
    if limit is not None and len(ids) > limit:
        alone = len(tokens(""))
        kept = tokenizer(document).input_ids[: max(limit - alone, 0)]
        while kept and len(ids) > limit:  # around the cut and in the template there may be some tokens more
            ids = tokens(tokenizer.decode(kept, skip_special_tokens=True))
            kept = kept if len(ids) <= limit else kept[:-1]
        if not kept:
            raise InputError(f"max-prompt-tokens must be more than the {alone} of the prompt alone, got {limit}")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and len(ids) + request.max_new_tokens > positions:
        raise InputError(
            f"the model has {positions} positions, and {len(ids)} prompt tokens with {request.max_new_tokens} new ones "
            "do not fit: use --max-prompt-tokens to cut the document"
        )
    return torch.tensor([ids])


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
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.prints:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()


def _generate(request: Request, model: Any, tokenizer: Any, input_ids: Tensor, cache: TreeCache) -> _Run:
    run = _Run()
    first = dist.get_rank() == 0
    if can_prefill(cache):
        columns = (
            TextColumn("reading"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not first, transient=True) as progress:
            task = progress.add_task("", total=input_ids.shape[1])
            prefill(
                model, input_ids, cache, chunk_tokens=request.chunk_tokens,
                on_progress=lambda done: progress.update(task, completed=done),
            )  # fmt: skip
        how = {}
    else:
        how = {"prefill_chunk_size": request.chunk_tokens}
    clock = _Clock(tokenizer, run, cache, prints=first)
    out = model.generate(
        input_ids, past_key_values=cache, attention_mask=torch.ones_like(input_ids), streamer=clock,
        **how, **_decoding(request),
    )  # fmt: skip
    run.tokens = out[0, input_ids.shape[1] :].tolist()
    return run


def _decoding(request: Request) -> dict[str, Any]:
    torch.manual_seed(request.seed)
    if request.sample:
        return {"max_new_tokens": request.max_new_tokens, "do_sample": True, "temperature": request.temperature}
    # None: what a model's generation_config says of sampling is not for us
    plain = dict.fromkeys(("temperature", "top_p", "top_k"))
    return {"max_new_tokens": request.max_new_tokens, "do_sample": False, **plain}


def _figures(
    request: Request, run: _Run, cache: TreeCache, prompt_tokens: int, size: int, device: torch.device
) -> dict[str, Any]:
    """The summary; times are the slowest rank's."""
    steps = len(run.token_s) - 1
    times = torch.tensor([run.token_s[0] - run.started_s, (run.token_s[-1] - run.token_s[0]) / max(steps, 1)])
    times = times.to(device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    kv_bytes: list[Any] = [None] * size
    dist.all_gather_object(kv_bytes, cache.kv_bytes)
    return {
        "model": request.model, "ranks": size, "device": str(device.type), "prompt_tokens": prompt_tokens,
        "new_tokens": len(run.tokens), "ttft_s": float(times[0]), "tpot_s": float(times[1]) if steps else None,
        "kv_bytes_per_rank": kv_bytes,
        "received_bytes_per_token": (run.received_bytes[-1] - run.received_bytes[0]) / steps if steps else None,
        "tokens": run.tokens,
    }  # fmt: skip


def _verify(request: Request, model: Any, tokenizer: Any, input_ids: Tensor, tokens: list[int]) -> dict[str, Any]:
    """The same on this process alone: transformers' own sdpa attention and DynamicCache."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    out = model.generate(
        input_ids, past_key_values=cache, attention_mask=torch.ones_like(input_ids),
        prefill_chunk_size=request.chunk_tokens, **_decoding(request),
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
    rows = {
        "read": f"{figures['prompt_tokens']} tokens on {figures['ranks']} ranks ({figures['device']})",
        "first token": f"{figures['ttft_s']:.2f} s",
        "wrote": f"{figures['new_tokens']} tokens" + (f", {1e3 * tpot:.1f} ms each" if tpot else ""),
        "KV cache": f"{megabytes} MB a rank",
        "received": f"{received / 1e3:.1f} kB a token and rank" if received is not None else "nothing",
    }
    if "verify" in figures:
        verdict = figures["verify"]
        rows["one process"] = (
            "writes the same tokens" if verdict["identical"] else f"differs from token {verdict['first_difference']} on"
        )
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    Console(stderr=True).print(table)
