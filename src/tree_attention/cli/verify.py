"""`tree-attention verify`. Only functions that run on the ranks import transformers: it takes seconds to load."""

import json
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from .launch import MODELS, run_on_ranks
from .options import VerifyOptions, check_options
from .terminal import say, under_torchrun

RANKS = 2


def verify_on_ranks(options: VerifyOptions) -> int:
    """Check everything that needs no model, then start the ranks. Returns the exit code."""
    check_options(options)
    nproc = RANKS if options.nproc is None and not under_torchrun() else options.nproc
    return run_on_ranks(_verify, nproc, options.device, options, preload=MODELS)


def _verify(options: VerifyOptions, device: torch.device) -> int:
    """Check each way on each rank; only the first prints. Returns the exit code."""
    from ..hf import check_model
    from .models import load_model

    model = load_model(options.model, options.dtype, device, tensor_parallel=options.tensor_parallel)
    start_s = time.perf_counter()
    ways = check_model(model, tokens=options.check_tokens)
    took_s = time.perf_counter() - start_s
    departs = any(way.departure is not None and not way.is_exact for way in ways)
    if dist.get_rank() == 0:
        dtype = str(model.dtype).removeprefix("torch.")
        console, table = Console(stderr=True), Table(show_header=False, box=None)
        for way in ways:
            table.add_row(f"[bold]{way.reading}, {way.writing}", str(way))
        console.print(
            f"{options.model}: {dtype}, {dist.get_world_size()} ranks ({device.type}), {took_s:.1f} s", soft_wrap=True
        )
        console.print(table)
        if options.as_json:
            say(json.dumps(_figures(options, ways, took_s) | {"dtype": dtype, "device": device.type}) + "\n")
    return 1 if departs else 0


def _figures(options: VerifyOptions, ways: list[Any], took_s: float) -> dict[str, Any]:
    listed = [asdict(way) | {"exact": way.is_exact} for way in ways]
    return {"model": options.model, "ranks": dist.get_world_size(), "seconds": took_s, "ways": listed}
