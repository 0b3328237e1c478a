"""`tree-attention generate`: a document into a spread cache, an answer out of it, and the figures."""

import torch

from ..errors import InputError
from .checks import check_options, read_document
from .launch import run_on_ranks
from .options import GenerateOptions


def generate_on_ranks(options: GenerateOptions) -> int:
    """Check what needs no model, then start the ranks; returns the exit code."""
    document = read_document(options.file)
    if options.random_weights:
        if options.config is None or not options.config.is_file() or options.max_prompt_tokens is None:
            raise InputError("random-weights needs --config FILE, a model's config.json, and --max-prompt-tokens")
        if options.model is not None or options.file is not None or options.prompt:
            raise InputError("random-weights reads random tokens: leave out --model, --prompt and --file")
        if options.verify and options.tensor_parallel != 1:
            raise InputError(
                "verify cannot draw the random weights of tensor-parallel ranks again: leave one of them out"
            )
    elif options.model is None or not options.prompt or options.config is not None:
        raise InputError("give --model and --prompt, or --random-weights with --config and --max-prompt-tokens")
    if options.sample and not options.temperature > 0:
        raise InputError(f"temperature must be positive, got {options.temperature}: without --sample the likeliest win")
    if not options.sample and options.temperature != 1:
        raise InputError("temperature is of the draw: add --sample, or leave it out")
    check_options(
        options.model, options.dtype, max_prompt_tokens=options.max_prompt_tokens,
        max_new_tokens=options.max_new_tokens, chunk_tokens=options.chunk_tokens, block_tokens=options.block_tokens,
    )  # fmt: skip
    return run_on_ranks(_on_rank, options.nproc, options.device, options, document)


def _on_rank(options: GenerateOptions, document: str, device: torch.device) -> int:
    from .generate_rank import generate  # with transformers, which takes seconds to load and only ranks need

    return generate(options, document, device)
