"""The sweep over model types (benchmarks/sweep.py): all that ever failed, and each day another tenth of the others."""

import datetime

import pytest

import sweep_models
import sweep_table
from sweep import examine, summary
from tree_attention.hf.model_types import KNOWN

EVER_FAILED = ["bart", "bert", "bloom", "deepseek_v32", "doge", "falcon_h1", "gemma4_unified", "gptj", "llama4_text"]
TODAY = datetime.date.today().toordinal() % 10


def of_today():
    pages = sweep_table.PAGE.read_text(encoding="utf-8")
    tried = {
        name.strip()
        for row in pages.partition(sweep_table.MARKS[0])[2].partition(sweep_table.MARKS[1])[0].splitlines()
        if row.startswith(("| exact", "| refused"))
        for name in row.split("|")[3].split(",")
    }
    known = sorted(tried & set(sweep_models.model_types()))
    return sorted({*known[TODAY::10], *EVER_FAILED})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", of_today())
def test_a_model_type(pool, model_type):
    line = examine(pool, model_type, numbers_of_ranks=(2,))
    assert line["verdict"] in ("exact", "no prefill", "refused"), line


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "exact"),
        ({0: "refused"}, "no prefill"),
        ({1: "refused"}, "FAIL"),
        ({0: "refused", 1: "refused"}, "refused"),
        ({0: "FAIL"}, "FAIL"),
    ],
)
def test_verdicts(changed, verdict):
    way = {"verdict": "exact", "difference": 1e-7, "allowed": 1e-5}
    records = [way | {"reading": "prefill"}, way | {"reading": "whole"}]
    records = [record | {"verdict": changed.get(i, "exact"), "why": "?"} for i, record in enumerate(records)]
    assert summary(records)["verdict"] == verdict


def test_the_library_carries_what_the_sweep_found():
    assert {"llama", "qwen3", "deepseek_v3", "gemma3_text", "bloom"} <= KNOWN
    assert "unheard_of" not in KNOWN
