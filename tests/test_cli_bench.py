"""`tree-attention bench generate`, `steps` and `prefill` as a user runs them, on the CPU."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaForCausalLM

from command import H_KV, LAYERS, SMALL, D, call, last_json, run
from tree_attention import Unsupported
from tree_attention.bench.model import measure_steps


def assert_is_a_chart(file, *texts):
    """matplotlib draws texts as shapes, each with the text in a comment before it."""
    drawn = file.read_text()
    assert [text for text in texts if f"<!-- {text} -->" not in drawn] == []


@pytest.mark.slow
def test_bench_weighs_and_times_its_contestants(folder, tmp_path):
    output = tmp_path / "records.jsonl"
    ended = run(
        "bench", "generate", "--model", folder, "--contexts", "96,64", "--decode-tokens", 2, "--rounds", 1,
        "--output", output, "--plot", tmp_path / "chart.svg",
    )  # fmt: skip
    assert_is_a_chart(tmp_path / "chart.svg", "tokens per second", "stock, 1 rank", "tree_attention, 2 ranks")
    records = last_json(ended)["records"]
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: line[key] for key in record} for line, record in zip(written, records, strict=True)] == records
    assert all({"date", "cpu", "torch", "transformers", "model"} <= set(line) for line in written)
    who = [(record["context_tokens"], record["what"], record["ranks"]) for record in records]
    contestants = [("stock", 1), ("tree_attention", 1), ("apart", 1), ("tree_attention", 2)]
    assert who == [(context, *contestant) for context in (64, 96) for contestant in contestants]
    for record in records:
        assert record["ttft_s"] > 0
        assert record["tpot_s"] > 0
        assert math.isfinite(record["ttft_s"] + record["tpot_s"])
        assert (record["received_bytes_per_token"] > 0) == (record["ranks"] == 2)
    of_token = LAYERS * 2 * H_KV * D * 4
    for stock, alone, _, shared in zip(*[iter(records)] * 4, strict=True):
        tokens = stock["context_tokens"]
        assert stock["kv_bytes_per_rank"] == of_token * tokens
        assert alone["kv_bytes_per_rank"] == of_token * tokens
        assert shared["kv_bytes_per_rank"] == of_token * tokens / 2
        assert f"{tokens} " in ended.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--contexts", "64;96"], "contexts must be a number such as 131072, 128k, 1M or 1e6, got '64;96'"),
        (["--contexts", "0"], "contexts, decode-tokens and rounds must be at least 1, nproc at least 2"),
        (["--nproc", 1], "contexts, decode-tokens and rounds must be at least 1, nproc at least 2"),
    ],
)
def test_mistakes_in_bench(capfd, monkeypatch, folder, options, text):
    code, out, err = call(capfd, monkeypatch, "bench", "generate", "--model", folder, *options)
    assert (code, out, err) == (2, "", f"tree-attention: {text}\n")


@pytest.mark.slow
def test_bench_steps_times_every_variant(folder, tmp_path):
    output = tmp_path / "records.jsonl"
    variants = ["ours eager", "ours captured", "stock eager"]
    ended = run(
        "bench", "steps", "--config", folder / "config.json", "--contexts", "700,64", "--tokens", 4, "--nproc", 2,
        "--ways", ",".join(variants), "--device", "cpu", "--output", output, "--plot", tmp_path / "chart.svg",
    )  # fmt: skip
    assert_is_a_chart(tmp_path / "chart.svg", "ms per token", "stock eager, 1 rank", "ours captured, 2 ranks")
    records = last_json(ended)["records"]
    assert [(each["context_tokens"], each["what"]) for each in records] == [
        (n, variant) for n in (64, 700) for variant in variants
    ]
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [each["tpot_s"] for each in kept] == [each["tpot_s"] for each in records]
    weights = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(folder).parameters()) * 4 - 256 * 64 * 4
    for each in records:
        assert each["tpot_s"] > 0
        held = each["context_tokens"] if each["ranks"] == 1 else (32 if each["context_tokens"] == 64 else 352)
        assert each["bytes"] == weights + held * LAYERS * 2 * H_KV * D * 4


@pytest.mark.slow
def test_bench_prefill_reads_whole_cycles_on_all_ranks(capfd, monkeypatch, folder, tmp_path):
    output = tmp_path / "records.jsonl"
    arguments = ["bench", "prefill", "--config", folder / "config.json", "--device", "cpu", "--nproc", 2]
    written = "--output", output, "--plot", tmp_path / "chart.svg"
    ended = run(*arguments, "--contexts", "512,64", "--chunk-tokens", 128, "--rounds", 2, *written)
    assert_is_a_chart(tmp_path / "chart.svg", "seconds to read", "stock, 1 rank", "ours, 2 ranks")
    records = last_json(ended)["records"]
    assert [(each["context_tokens"], each["what"]) for each in records] == [
        (64, "ours"), (64, "stock"), (512, "ours"), (512, "stock"),
    ]  # fmt: skip
    assert [json.loads(line)["seconds"] for line in output.read_text().splitlines()] == [
        each["seconds"] for each in records
    ]
    parameters = LlamaForCausalLM.from_pretrained(folder).named_parameters()
    of_layers = sum(p.numel() for name, p in parameters if ".layers." in name)
    of_token = LAYERS * 2 * H_KV * D * 4
    for each in records:
        tokens, heads = each["context_tokens"], SMALL["num_attention_heads"]
        assert each["flops"] == 2 * of_layers * tokens + 4 * D * heads * LAYERS * tokens * (tokens + 1) / 2
        assert min(each["first_s"], each["seconds"]) > 0
        # ours has room for one token more, and each layer a place that is not read
        held = tokens if each["ranks"] == 1 else tokens // 2 + 2
        assert each["kv_bytes"] == held * of_token
    code, _, err = call(capfd, monkeypatch, *arguments, "--ways", "theirs")
    assert code == 2
    assert err.endswith("tree-attention: variants must be all or some of ours, stock, got 'theirs'\n")


def test_bench_steps_refuses_what_it_cannot_fill():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, num_hidden_layers=2, head_dim=D, sliding_window=64))
    with pytest.raises(Unsupported, match="attention only, this model has DynamicSlidingWindowLayer: use generate"):
        measure_steps(model, 64, ["ours eager"], tokens=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--config", "absent.json"], "config must be a model's config.json, got absent.json"),
        (["--contexts", 0], "contexts, nproc and tokens must be at least 1, got 0, 2 and 32"),
        (
            ["--ways", "ours,stock eager"],
            "variants must be all or some of ours eager, ours captured, ours compiled, ",
        ),
    ],
)
def test_mistakes_in_bench_steps(capfd, monkeypatch, folder, options, text):
    options = ["--config", folder / "config.json", *options]
    code, out, err = call(capfd, monkeypatch, "bench", "steps", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"tree-attention: {text}")
