"""`tree-attention generate`: a document into a spread cache, an answer out of it, and the figures."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError
from .checks import check_options, read_document
from .launch import run_on_ranks


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    model: str | None
    config: Path | None
    random_weights: bool
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
    tensor_parallel: int
    block_tokens: int
    chunk_tokens: int | None
    compiled: bool
    extrapolate: bool
    verify: bool
    as_json: bool


def generate_on_ranks(request: Request, nproc: int | None) -> int:
    """Check what needs no model, then start the ranks; returns the exit code."""
    document = read_document(request.file)
    if request.random_weights:
        if request.config is None or not request.config.is_file() or request.max_prompt_tokens is None:
            raise InputError("random-weights needs --config FILE, a model's config.json, and --max-prompt-tokens")
        if request.model is not None or request.file is not None or request.prompt:
            raise InputError("random-weights reads random tokens: leave out --model, --prompt and --file")
        if request.verify and request.tensor_parallel != 1:
            raise InputError(
                "verify cannot draw the random weights of tensor-parallel ranks again: leave one of them out"
            )
    elif request.model is None or not request.prompt or request.config is not None:
        raise InputError("give --model and --prompt, or --random-weights with --config and --max-prompt-tokens")
    if request.sample and not request.temperature > 0:
        raise InputError(f"temperature must be positive, got {request.temperature}: without --sample the likeliest win")
    if not request.sample and request.temperature != 1:
        raise InputError("temperature is of the draw: add --sample, or leave it out")
    check_options(
        request.model, request.dtype, max_prompt_tokens=request.max_prompt_tokens,
        max_new_tokens=request.max_new_tokens, chunk_tokens=request.chunk_tokens, block_tokens=request.block_tokens,
    )  # fmt: skip
    return run_on_ranks(_on_rank, nproc, request.device, request, document)


def _on_rank(request: Request, document: str, device: torch.device) -> int:
    from .generate_rank import generate  # with transformers, which takes seconds to load and only ranks need

    return generate(request, document, device)
