"""`tree-attention generate`. Only functions that run on the ranks import transformers: it takes seconds to load."""

import copy
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import InputError
from ..group import gather_values
from .launch import MODELS, run_on_ranks, set_threads
from .options import GenerateOptions, check_options, read_document
from .plots import draw
from .terminal import reading_bar, say

WARM_UP_TOKENS = 4  # after the first one: kernels are compiled and a graph is captured on GPUs


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
        got = options.temperature
        raise InputError(f"temperature must be positive, got {got}: leave out --sample for the most likely tokens")
    if not options.sample and options.temperature != 1:
        raise InputError("temperature is for sampling: add --sample, or leave it out")
    check_options(options)
    return run_on_ranks(_generate, options.nproc, options.device, options, document, preload=MODELS)


def _generate(options: GenerateOptions, document: str, device: torch.device) -> int:
    from .models import check_positions, check_step_mode, load_model, open_session, random_prompt, text_prompt

    check_step_mode(options.compiled, device)
    name, split, random = options.model or str(options.config), options.tensor_parallel, options.random_weights
    model = load_model(name, options.dtype, device, random=random, tensor_parallel=split)
    prompt = random_prompt(options, model.config) if random else text_prompt(options, document)
    check_positions(options, model.config, prompt.tokens, options.max_new_tokens)
    max_tokens = prompt.tokens + options.max_new_tokens
    capacity = max_tokens if device.type == "cuda" else None
    session = open_session(options, model, prompt.tokenizer, capacity, prompt.template)
    session.cache.reserve(max_tokens)
    dist.barrier()
    (figures, steps_s), is_first = _answer(options, session, prompt), dist.get_rank() == 0
    input_ids, logits = session.tokens[:, : prompt.tokens], session.logits
    dist.destroy_process_group()
    if not is_first:
        return 0
    if options.verify:
        del session
        set_threads(1)
        if split != 1:  # this rank holds a part of the weights
            del model
            model = load_model(name, options.dtype, device)
        figures["verify"] = _verify(options, model, input_ids, figures["tokens"], logits)
    _report(figures)
    if options.plot is not None:
        points = [(float(token), 1e3 * step_s) for token, step_s in enumerate(steps_s, 2)]
        label = f"{figures['ranks']} ranks ({figures['device']}), {figures['prompt_tokens']} tokens read"
        draw(options.plot, {label: points}, title=Path(name).name, x="token", y="ms per token", of_size=False)
    if options.as_json:
        say(json.dumps(figures) + "\n")
    return 0 if figures.get("verify", {}).get("exact", True) else 1


def _answer(options: GenerateOptions, session: Any, prompt: Any) -> tuple[dict[str, Any], list[float]]:
    """Read and answer; the first rank shows the bar and the text.

    Returns the figures, with times of the slowest rank, and what each token after the first took on this rank.
    """
    from .models import generate_kwargs

    is_first, cache = dist.get_rank() == 0, session.cache
    written: list[tuple[int, float, float]] = []  # of each token: its id, this rank's clock, bytes received so far
    torch.manual_seed(options.seed)
    start_s = time.perf_counter()

    def on_token(token: int) -> None:
        written.append((token, time.perf_counter(), cache.received_bytes))

    with reading_bar(len(prompt.text), shown=is_first) as on_progress:
        session.read(prompt.text, chunk_tokens=options.chunk_tokens, on_progress=on_progress)
    kept = {"output_logits": True, "return_dict_in_generate": True} if options.verify else {}
    for piece in session.ask(prompt.question, on_token=on_token, **generate_kwargs(options), **kept):
        if is_first:
            say(piece)
    if is_first and not options.random_weights:
        say("\n")
    tokens, times_s, received = zip(*written, strict=True)
    steps_s, steps = [after - before for before, after in itertools.pairwise(times_s)], len(tokens) - 1
    steady_s = steps_s[WARM_UP_TOKENS:] or steps_s or [0.0]
    tpot_s = statistics.fmean(steady_s)
    warm_up_s = max(sum(steps_s) - steps * tpot_s, 0.0)
    slowest = torch.tensor([times_s[0] - start_s, tpot_s, warm_up_s], device=session.tokens.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    figures = {"model": options.model or str(options.config), "random_weights": options.random_weights}
    figures |= {"ranks": dist.get_world_size(), "tensor_parallel": options.tensor_parallel}
    figures |= {"device": slowest.device.type, "prompt_tokens": prompt.tokens, "new_tokens": len(tokens)}
    figures |= {"ttft_s": float(slowest[0]), "tpot_s": float(slowest[1]) if steps else None}
    figures |= {"warm_up_s": float(slowest[2]), "tokens_per_step": len(tokens) / session.steps}
    figures |= {"kv_bytes_per_rank": gather_values(cache.kv_bytes, dist.group.WORLD)}
    figures |= {"received_bytes_per_token": (received[-1] - received[0]) / steps if steps else None}
    return figures | {"tokens": list(tokens)}, steps_s


def _verify(options: GenerateOptions, model: Any, input_ids: Tensor, tokens: list[int], ours: Any) -> dict[str, Any]:
    """Compare our logits `[new, vocabulary]` with those that this process alone gives for the text that we wrote."""
    from transformers import DynamicCache

    from ..hf.check import Departure, feed, one_by_one, stock_implementation
    from ..hf.inputs import CACHE
    from ..hf.parallel_prefill import CHUNK_TOKENS

    model.set_attn_implementation(stock_implementation(model))
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    out = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        prefill_chunk_size=options.chunk_tokens or CHUNK_TOKENS["cpu"],
        **{CACHE: cache},
        **dict.fromkeys(("temperature", "top_p", "top_k")),
        do_sample=False,
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    stock = again = out.logits[0]
    if len(tokens) > 1:
        text = torch.cat([input_ids, input_ids.new_tensor([tokens[:-1]])], 1)
        start, stop, copied = input_ids.shape[1], text.shape[1], copy.deepcopy(cache)
        with torch.no_grad():
            stock = torch.cat([stock, feed(model, text, cache, one_by_one(start, stop))])
            again = torch.cat([again, feed(model, text, copied, [stop])])
    found = Departure.of(ours, stock, again, model.dtype)
    best, of_ours = stock.argmax(-1), ours.argmax(-1)
    gaps = (stock.gather(1, best[:, None]) - stock.gather(1, of_ours[:, None]))[:, 0]
    ties = [{"token": i, "gap": float(gaps[i])} for i in (best != of_ours).nonzero().flatten().tolist()]
    return {
        "exact": found.token is None,
        "identical": found.token is None and not ties,
        "first_difference": found.token,
        "largest_difference": found.difference,
        "rounding": found.allowed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "ties": ties,
    }


def _report(figures: dict[str, Any]) -> None:
    megabytes = ", ".join(f"{nbytes / 1e6:.1f}" for nbytes in figures["kv_bytes_per_rank"])
    tpot, received = figures["tpot_s"], figures["received_bytes_per_token"]
    per_step = f", {figures['tokens_per_step']:.2f} per step" if figures["tokens_per_step"] > 1 else ""
    warm_up = f" after a warm-up of {figures['warm_up_s']:.1f} s" if figures["warm_up_s"] >= 0.05 else ""
    split = f", heads and weights over {figures['tensor_parallel']} of them" if figures["tensor_parallel"] > 1 else ""
    ranks = "1 rank" if figures["ranks"] == 1 else f"{figures['ranks']} ranks"
    rows = {
        "read": f"{figures['prompt_tokens']} tokens on {ranks} ({figures['device']}){split}",
        "first token": f"{figures['ttft_s']:.2f} s",
        "wrote": f"{figures['new_tokens']} tokens" + (f", {1e3 * tpot:.1f} ms each{per_step}{warm_up}" if tpot else ""),
        "KV cache": f"{megabytes} MB per rank",
        "received": f"{received / 1e3:.1f} kB per token and rank" if received is not None else "nothing",
    }
    if figures["random_weights"]:
        rows["model"] = "random weights: the times count, the tokens mean nothing"
    if "verify" in figures:
        rows["one process"] = _verdict(figures["verify"])
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    Console(stderr=True).print(table)


def _verdict(found: dict[str, Any]) -> str:
    difference, rounding = f"{found['largest_difference']:.1e}", f"{found['rounding']:.1e}"
    if not found["exact"]:
        first = found["first_difference"]
        return f"differs from token {first} on: logits by up to {difference}, rounding explains {rounding}"
    if not found["ties"]:
        return f"writes the same tokens; logits differ by up to {difference}, rounding explains {rounding}"
    tie = found["ties"][0]
    return (
        f"has the same logits, and a rounding tie at token {tie['token']}: its two best logits differ by "
        f"{tie['gap']:.1e}, less than {found['dtype']} rounds them by, {rounding}"
    )
