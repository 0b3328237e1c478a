"""`tree-attention generate`: check the options, then start the ranks, which run generate_rank.py."""

import torch

from ..errors import InputError
from .checks import check_options, read_document
from .launch import run_on_ranks
from .options import GenerateOptions


def generate_on_ranks(options: GenerateOptions) -> int:
    """Check everything that needs no model, then start the ranks. Returns the exit code."""
    document = read_document(options.file)
    if options.random_weights:
        if options.config is None or not options.config.is_file() or options.max_prompt_tokens is None:
            raise InputError("random-weights needs --config FILE, a model's config.json, and --max-prompt-tokens")
        if options.model is not None or options.file is not None or options.prompt:
            raise InputError("random-weights reads random tokens: leave out --model, --prompt and --file")
        if options.verify and options.tensor_parallel != 1:
            raise InputError("verify cannot reproduce random weights of tensor-parallel ranks: leave out one of them")
    elif options.model is None or not options.prompt or options.config is not None:
        raise InputError("give --model and --prompt, or --random-weights with --config and --max-prompt-tokens")
    if options.sample and not options.temperature > 0:
        raise InputError(
            f"temperature must be positive, got {options.temperature}: leave out --sample for the most likely tokens"
        )
    if not options.sample and options.temperature != 1:
        raise InputError("temperature is for sampling: add --sample, or leave it out")
    check_options(options)
    return run_on_ranks(_on_rank, options.nproc, options.device, options, document)


def _on_rank(options: GenerateOptions, document: str, device: torch.device) -> int:
    from .generate_rank import generate  # loads transformers, which takes seconds: only the ranks need it

    return generate(options, document, device)
