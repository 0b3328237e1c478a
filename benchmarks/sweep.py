"""Compare every causal language model of the installed transformers, tiny and random, with stock eager attention.

    python benchmarks/sweep.py [MODEL_TYPE ...] > FILE.jsonl      one line for each model type (all: 20 to 30 minutes)
    python benchmarks/sweep.py --table FILE.jsonl ...             writes the table of docs/models.md, and model_types.py

Of a model type that has several lines, the last one counts. The counts are printed to stderr.

exact       same tokens, and logits within 1e-5 of the largest one, or of stock's own spread between ways of reading;
            with 2 and 3 ranks, padded and not, dynamic and static, read whole, in chunks and by `prefill`, two turns
no prefill  the same, but `prefill` raises one of our errors before anything is computed
refused     every call raises one of our errors before anything is computed
stock       stock attention itself cannot run the model in this way: it has no keys to spread, or another kind of input
FAIL        anything else: wrong logits, another exception, ranks that disagree, a hang
"""

import argparse
import contextlib
import functools
import itertools
import json
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import DynamicCache

import sweep_table
from sweep_models import VOCABULARY, model_types, tiny_config, tiny_model
from tree_attention import TreeAttentionError
from tree_attention.hf import TreeCache, prefill
from tree_attention.hf.inputs import CACHE, VERSION
from tree_attention.testing import RankPool

TOKENS, SAID, NEW, BLOCK = 45, 14, 3, 4  # the prompt, the second turn, the tokens of an answer
LIMIT_S = 300.0  # per model type
TOLERANCE = 1e-5
GREEDY = {
    "max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    "eos_token_id": None,
}  # fmt: skip
CHUNKS_FEED_AGAIN = VERSION < (5, 23)
WAYS: list[dict[str, Any]] = [
    {"padded": padded, "static": static, "reading": reading}
    for padded, static, reading in itertools.product((False, True), (False, True), ("whole", "chunked", "prefill"))
]
AUTOMATIC = {"padded": True, "static": False, "reading": "no cache given"}


def two_turns(model: Any, padded: bool, reading: str, cache: Any = None) -> tuple[Tensor, Tensor]:
    """Read, answer, read more, answer: the text `[2, n]`, and the logits `[2 * NEW, 2, vocabulary]`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9], ids[1, :9] = 0, 0
    logits: list[Tensor] = []
    for turn in range(2):
        how = {} if cache is None else {CACHE: cache}
        if reading == "chunked" and not (turn and CHUNKS_FEED_AGAIN):
            how["prefill_chunk_size"] = 16
        if reading == "prefill":
            prefill(model, ids, cache, attention_mask=mask, chunk_tokens=24)
        out = model.generate(ids, attention_mask=mask, **how, **GREEDY)
        logits += out.logits
        said = torch.randint(3, VOCABULARY, (2, SAID), generator=generator)
        ids = torch.cat([out.sequences, said], 1)
        mask = torch.cat([mask, torch.ones(2, NEW + SAID, dtype=torch.long)], 1)
    return ids, torch.stack(logits)


Expected = dict[tuple[bool, str], tuple[Tensor, Tensor, float]]


def stock(model_type: str) -> Expected | str:
    """The text, the logits and the tolerance for padded or not, and each reading; or why stock cannot run the model."""
    results = {}
    try:
        model = tiny_model(model_type, "eager")
        for padded in (False, True):
            text, logits = two_turns(model, padded, "whole", stock_cache(model))
            if not logits.isfinite().all():
                return "logits are not finite"
            rounding = TOLERANCE * float(logits.abs().max())
            chunked, spread = (text, logits), 0.0
            with contextlib.suppress(Exception):  # stock cannot read some models in chunks
                chunked = two_turns(model, padded, "chunked", stock_cache(model))
                spread = float((chunked[1] - logits).abs().max())
            results[padded, "whole"] = text, logits, rounding
            results[padded, "prefill"] = results[padded, AUTOMATIC["reading"]] = text, logits, rounding + spread
            results[padded, "chunked"] = *chunked, rounding
    except Exception as error:  # stock attention cannot run this model here: recorded, and the sweep goes on
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
    return results


def stock_cache(model: Any) -> DynamicCache | None:
    """None for models that make a cache of their own, or have none."""
    has_its_own = model.config.model_type in (
        "falcon_mamba",
        "mamba",
        "mamba2",
        "minimax",
        "openai-gpt",
        "xlm",
        "xlnet",
    )
    return None if has_its_own else DynamicCache(config=model.config)


def ours(group: Any, model_type: str, expected: Expected) -> list[dict[str, Any]]:
    """A record of each way on this rank."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    records, modules_run = [], [0]
    try:
        model = tiny_model(model_type, "tree_attention")
    except Exception as error:  # whatever a model raises is a result of the sweep
        return [{"verdict": _verdict(error), "why": _text(error)} | way for way in WAYS]
    for module in model.modules():
        module.register_forward_pre_hook(functools.partial(_count, modules_run))
    for way in WAYS + [AUTOMATIC] * (group.size() == dist.get_world_size()):
        text, logits, tolerance = expected[way["padded"], way["reading"]]
        modules_run[0] = 0
        record: dict[str, Any] = {"ranks": group.size(), **way}
        try:
            cache = None
            if way is not AUTOMATIC:
                max_tokens = text.shape[1] if way["static"] else None
                cache = TreeCache(model.config, group, block_tokens=BLOCK, max_tokens=max_tokens)
            its_text, its_logits = two_turns(model, way["padded"], way["reading"], cache)
            difference = float((its_logits - logits).abs().max())
            record |= {"difference": difference, "allowed": tolerance}
            record["bits"] = int(its_logits.view(torch.int32).long().sum())
            record["verdict"] = "exact" if difference <= tolerance and its_text.equal(text) else "FAIL"
        except Exception as error:  # whatever a model raises is a result of the sweep
            record |= {"verdict": _verdict(error), "why": _text(error)}
            if modules_run[0] and record["verdict"] == "refused":
                record |= {"verdict": "FAIL", "why": f"after {modules_run[0]} modules: {record['why']}"}
        records.append(record)
    return records


def _count(counter: list[int], *_: Any) -> None:
    counter[0] += 1


def _verdict(error: Exception) -> str:
    return "refused" if isinstance(error, TreeAttentionError) else "FAIL"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def examine(pool: RankPool, model_type: str, numbers_of_ranks: Sequence[int] = (2, 3)) -> dict[str, Any]:
    """The verdict over a model type, with what it rests on."""
    start = time.monotonic()
    text_type = tiny_config(model_type).get_text_config(decoder=True).model_type
    line: dict[str, Any] = {"model_type": model_type, "text": text_type, "transformers": transformers.__version__}
    expected = stock(model_type)
    if isinstance(expected, str):
        return line | {"verdict": "stock", "why": expected} | refusal(model_type)
    records: list[dict[str, Any]] = []
    for ranks in numbers_of_ranks:
        timer = threading.Timer(LIMIT_S, pool.close)
        timer.start()
        try:
            by_rank = pool.run(ours, model_type, expected, ranks=ranks)
        except Exception as error:  # whatever a model raises is a result of the sweep
            hung = not timer.is_alive()
            return line | {"verdict": "FAIL", "why": f"{ranks} ranks: {'hang' if hung else _text(error)}"}
        finally:
            timer.cancel()
        for of_ranks in zip(*by_rank, strict=True):
            record = dict(of_ranks[0])
            if any(its.get(name) != record.get(name) for its in of_ranks for name in ("verdict", "why", "bits")):
                record |= {"verdict": "FAIL", "why": f"ranks disagree: {[its.get('why') for its in of_ranks]}"}
            records.append(record)
    return line | summary(records) | {"seconds": round(time.monotonic() - start, 1)}


def refusal(model_type: str) -> dict[str, Any]:
    """The verdict over a model that stock attention cannot run here, if we refuse it by its configuration."""
    try:
        TreeCache(tiny_model(model_type, "tree_attention").config)
    except TreeAttentionError as error:
        return {"verdict": "refused", "why": _text(error)}
    except Exception:  # no small model: nothing to refuse
        return {}
    return {}


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [record for record in records if record["verdict"] == "FAIL"]
    records = [record for record in records if record["reading"] != AUTOMATIC["reading"]]
    refused = [record for record in records if record["verdict"] == "refused"]
    differences = [record["difference"] / record["allowed"] for record in records if record["verdict"] == "exact"]
    if failed:
        kinds = Counter(record.get("why", f"differs by {record.get('difference', 0):.1e}")[:200] for record in failed)
        return {
            "verdict": "FAIL",
            "why": kinds.most_common(3),
            "of": f"{len(failed)}/{len(records)}",
            "first": failed[0],
        }
    largest = {"largest_share_of_tolerance": max(differences)} if differences else {}
    if not refused:
        return {"verdict": "exact", **largest}
    why = refused[0]["why"]
    if len(refused) == len(records):
        return {"verdict": "refused", "why": why}
    if all(record["reading"] == "prefill" for record in refused):
        return {"verdict": "no prefill", "why": why, **largest}
    return {"verdict": "FAIL", "why": f"refused in {len(refused)} of {len(records)} ways: {why}"}


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--table", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        sweep_table.write(arguments.table)
        return
    names = arguments.model_types or model_types()
    pool = RankPool(3, preload=("tree_attention.hf", "tree_attention.testing", "sweep_models"))
    counts: Counter[str] = Counter()
    for name in names:
        line = _examine_or_say_why(pool, name)
        counts[line["verdict"]] += 1
        print(json.dumps(line), flush=True)
    pool.close()
    print(json.dumps(counts), file=sys.stderr)


def _examine_or_say_why(pool: RankPool, model_type: str) -> dict[str, Any]:
    try:
        return examine(pool, model_type)
    except Exception as error:  # no small configuration: the sweep goes on
        return {"model_type": model_type, "verdict": "stock", "why": _text(error)}


if __name__ == "__main__":
    main()
