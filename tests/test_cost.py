"""The cost model: against hand-made sums, the library's own bytes, the recorded measurements, models that are built."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from predict import OURS, model_tables, predict, predict_prefill, predict_token, read, summary, table
from tree_attention.cost.decode import ALGORITHMS, AttentionShape, RankGroup, decode_cost, exchange_cost
from tree_attention.cost.machine import (
    GPUS,
    LINKS,
    MACHINES,
    Calibration,
    load_calibration,
    override,
    preset_machine,
    save_calibration,
)
from tree_attention.cost.mesh import CHUNK_TOKENS, MASKED_CHUNK_TOKENS, SUMMED_NUMBERS, estimate_mesh
from tree_attention.cost.model import PRESETS, load_model_spec, parse_config, preset_names
from tree_attention.hf.link_sums import ROWS, WIDTH
from tree_attention.hf.parallel_prefill import CHUNK_TOKENS as PREFILL_CHUNK_TOKENS
from tree_attention.hf.parallel_prefill import MASKED_CHUNK_TOKENS as PREFILL_MASKED_CHUNK_TOKENS
from tree_attention.reduce import received_bytes

FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
STEPS = sorted(FOLDER.glob("*_steps.jsonl"))
RESULTS = [file for file in sorted(FOLDER.glob("*.jsonl")) if read([file])]
PREFILL = FOLDER / "2026-11-24_2xH200_prefill.jsonl"
LLAMA = AttentionShape(1, 32, 8, 128, 65536)
TINY = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 96}


def test_presets_say_where_their_numbers_come_from():
    for part in (*GPUS.values(), *LINKS.values()):
        assert "measured" in part.source.lower() or "assumed" in part.source or "as " in part.source
        assert all(value > 0 for value in vars(part).values() if isinstance(value, float))
    assert set(MACHINES) == set(GPUS)


def test_unknown_presets_are_listed():
    with pytest.raises(ValueError, match=r"h100, h200, b200.*got 'h300'"):
        preset_machine("h300")
    with pytest.raises(ValueError, match="nvlink4"):
        preset_machine("h100", inside="token-ring")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        preset_machine("h100", per_node=0)


def test_a_machine_can_have_other_links():
    other = preset_machine("H100", per_node=4, inside="pcie5", across="ethernet-100g")
    assert (other.per_node, other.inside, other.across) == (4, LINKS["pcie5"], LINKS["ethernet-100g"])
    assert other.gpu == GPUS["h100"]


def test_one_rank_reads_and_launches():
    on = preset_machine("h100")
    for algorithm in ALGORITHMS:
        cost = decode_cost(LLAMA, on, 1, algorithm)
        assert cost.total_s == 65536 * 8 * 2 * 128 * 2 / on.gpu.read_bytes_per_s + on.gpu.launch_s
        assert (cost.exchange_s, cost.inside_bytes, cost.across_bytes, cost.bound) == (0.0, 0.0, 0.0, "read")


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("all_reduce", "all_reduce"), ("all_gather", "all_gather"), ("tree", "tree"), ("symmetric", "symmetric")],
)
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_bytes_are_those_that_the_library_says_it_receives(algorithm, name, ranks):
    shape = AttentionShape(3, 32, 8, 128, 1000, head_dim_v=64, query_tokens=2)
    expected = received_bytes(name, rows=3 * 2 * 32, head_dim=64, world_size=ranks)
    assert decode_cost(shape, preset_machine("h100"), ranks, algorithm).inside_bytes == pytest.approx(expected)


def test_the_papers_volumes():
    """arXiv 2408.04093 eq 10 and 14: 640,000 tokens over 8 GPUs, 16 heads x 128, 16 bits."""
    shape = AttentionShape(1, 16, 16, 128, 80_000)
    ring = decode_cost(shape, preset_machine("h100"), 8, "ring")
    assert ring.inside_bytes == 7 * 2 * 80_000 * 2048 * 2
    tree = decode_cost(shape, preset_machine("h100"), 8, "all_reduce")
    assert tree.inside_bytes == pytest.approx(2 * 7 / 8 * (2048 + 2 * 16) * 4)
    assert ring.exchange_s > 100 * tree.exchange_s


def test_an_exchange_by_hand():
    """64 heads x 129 float32 from 16 ranks on 2 nodes of 8, by two levels and by all-gather."""
    on, shape = preset_machine("h100"), AttentionShape(1, 64, 8, 128, 1000)
    n, inside, across = 64 * 129 * 4, on.inside, on.across
    seconds, near, far = exchange_cost(shape, on, RankGroup(16, 8), "two_level")
    level = 2 * 7 / 8 * n
    expected = 2 * (inside.latency_s + on.gpu.kernel_s + level / inside.bytes_per_s)
    expected += across.collective_s + n / 8 / across.bytes_per_s + 5 * on.gpu.kernel_s
    assert (seconds, near, far) == (pytest.approx(expected), 2 * level, n / 8)
    seconds, near, far = exchange_cost(shape, on, RankGroup(16, 8), "all_gather")
    assert (near, far) == (15 * n, n)
    assert seconds > across.collective_s + 14 * inside.latency_s


def test_a_ring_hides_its_hops_behind_attention_if_the_link_is_fast_enough():
    slow = preset_machine("h100")
    assert decode_cost(LLAMA, slow, 4, "ring").exchange_s > 0
    fast = replace(slow, inside=replace(slow.inside, bytes_per_s=1e15, collective_s=1e-9))
    cost = decode_cost(LLAMA, fast, 4, "ring")
    assert cost.exchange_s == 0
    assert cost.read_s == pytest.approx(4 * decode_cost(LLAMA, fast, 1).read_s)


def test_the_rank_with_most_keys_decides():
    ragged = replace(LLAMA, keys=(10, 65536, 0))
    assert decode_cost(ragged, preset_machine("h200"), 3) == decode_cost(LLAMA, preset_machine("h200"), 3)


def test_arithmetic_counts_where_it_takes_longer_than_memory():
    verify = replace(LLAMA, query_tokens=4096)
    on = preset_machine("h100")
    assert decode_cost(verify, on, 1).read_s == pytest.approx(4 * 32 * 4096 * 65536 * 128 / on.gpu.matmul_flops_per_s)


@pytest.mark.parametrize(
    ("change", "ranks", "algorithm", "text"),
    [
        ({}, 2, "telepathy", "algorithm must be one of ring"),
        ({}, 16, "fused", "needs all ranks on one node, got 16 ranks on 2"),
        ({}, 0, "ring", "at least 1"),
        ({"batch": 0}, 2, "ring", "at least 1"),
        ({"keys": -1}, 2, "ring", "keys at least 0"),
        ({"keys": (1, 2, 3)}, 2, "ring", "one number or one per rank .2., got 3"),
    ],
)
def test_what_cannot_be_is_refused(change, ranks, algorithm, text):
    with pytest.raises(ValueError, match=text):
        decode_cost(replace(LLAMA, **change), preset_machine("h100"), ranks, algorithm)


def test_writing_into_peers_memory_needs_peer_access():
    with pytest.raises(ValueError, match="pcie4 lacks"):
        decode_cost(LLAMA, preset_machine("rtx4090"), 2, "fused")


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_ours_is_predicted_within_15_percent_of_what_was_measured(file):
    records = [record for record in read([file]) if record["what"] in OURS]
    assert records
    for record in records:
        assert record["predicted_s"] == pytest.approx(record["graph_s"], rel=0.15), record


def test_a_calibration_predicts_ours_within_15_percent_too():
    given = load_calibration(FOLDER / "2026-11-25_2xH100_machine.json").machine
    on_h100 = [file for file in RESULTS if "2xH100" in file.name]
    records, others = read(on_h100, given), read(on_h100)
    assert [record["predicted_s"] for record in records] != [record["predicted_s"] for record in others]
    for record in records:
        if record["what"] in OURS:
            assert record["predicted_s"] == pytest.approx(record["graph_s"], rel=0.15), record


@pytest.mark.parametrize("file", STEPS, ids=lambda file: file.stem)
def test_compiled_steps_are_predicted_within_15_percent(file):
    records = [json.loads(line) for line in file.read_text().splitlines()]
    compiled = [record for record in records if record["what"] == "ours compiled"]
    assert compiled
    for record in compiled:
        assert predict_token(record) == pytest.approx(record["tpot_s"], rel=0.15), record


def test_the_table_of_predictions_has_a_line_for_each_case():
    records = read(RESULTS)
    assert len(list(table(records))) == 2 + len(records)
    assert any(line.startswith("fused (ours)") for line in summary(records))
    unknown = records[0] | {"gpus": ["Some other card"]}
    assert predict(unknown) is None
    assert predict(records[0] | {"what": "flashinfer"}) is None


def test_a_models_step_is_predicted_where_it_was_measured_in_a_graph(tmp_path):
    record = {
        "device": "NVIDIA H200", "model": "llama-3.1-8b", "ranks": 2, "context_tokens": 131072, "tpot_s": 0.008,
        "what": "ours compiled",
    }  # fmt: skip
    lines = [record, record | {"what": "ours eager"}, record | {"device": "cpu"}, record | {"tpot_s": None}]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read([tmp_path / "steps.jsonl"]) == []
    *_, row = rows = list(model_tables([tmp_path / "steps.jsonl"]))
    assert len(rows) == 3
    mesh = estimate_mesh(load_model_spec("llama-3.1-8b"), preset_machine("h200"), 131072, 1, 1, 2)
    assert f"| 8.00 | {1e3 * mesh.token_s:.2f} |" in row


def test_prefill_is_predicted_within_10_percent_of_what_was_measured():
    records = list(map(json.loads, PREFILL.read_text().splitlines()))
    assert len(list(model_tables([PREFILL]))) == 2 + len(records)
    for record in records:
        assert predict_prefill(record) == pytest.approx(record["seconds"], rel=0.1)


def test_the_largest_sum_through_peer_memory_is_the_librarys():
    assert SUMMED_NUMBERS == ROWS * WIDTH


def test_a_chunk_of_prefill_is_the_librarys():
    assert PREFILL_CHUNK_TOKENS["cuda"] == CHUNK_TOKENS
    assert MASKED_CHUNK_TOKENS == PREFILL_MASKED_CHUNK_TOKENS


@pytest.mark.parametrize(
    ("name", "weights", "active", "key_bytes"),
    [
        ("llama-3.1-8b", 8.03e9, 7.50e9, 4096),
        ("llama-3.1-70b", 70.6e9, 69.5e9, 4096),
        ("qwen3-32b", 32.8e9, 32.0e9, 4096),
        ("deepseek-v3", 671e9, 36.6e9, 1152),
    ],
)
def test_presets_have_the_published_sizes(name, weights, active, key_bytes):
    model = load_model_spec(name)
    assert model.weights == pytest.approx(weights, rel=2e-3)
    assert model.flops_per_token / 2 == pytest.approx(active, rel=2e-3)
    assert (model.key_bytes, preset_names().count(name)) == (key_bytes, 1)


@pytest.mark.parametrize("name", preset_names())
def test_weights_are_those_of_the_model_that_transformers_builds(name, tmp_path):
    """Without memory, and with 5 layers, of which deepseek-v3 has 3 without experts."""
    config = json.loads((PRESETS / f"{name}.json").read_text()) | {"num_hidden_layers": 5}
    config |= {"n_routed_experts": 16} if "n_routed_experts" in config else {}
    config.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = sum(weight.numel() for weight in built.parameters())
    assert load_model_spec(str(tmp_path)).weights == pytest.approx(expected, rel=1e-5)  # the norms of heads and latents


def test_what_a_config_leaves_out():
    model = parse_config(TINY, "tiny")
    assert (model.heads, model.kv_heads, model.head_dim, model.layers, model.kv_itemsize) == (4, 4, 16, 6, 2)
    assert model.embedding_weights == 0, "tied by default, as transformers has it"
    nested = parse_config({"text_config": TINY, "vision_config": {"hidden_size": 7}, "dtype": "float32"}, "nested")
    assert (nested.hidden, nested.kv_itemsize) == (64, 4)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 12}, [12] * 6),
        ({"sliding_window": None}, [None] * 6),
        ({"sliding_window": 12, "use_sliding_window": False}, [None] * 6),
        ({"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 4}, [None] * 4 + [12] * 2),
        ({"sliding_window": 12, "sliding_window_pattern": 3}, [12, 12, None] * 2),
        ({"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 3}, [12, None] * 3),
        ({"layer_types": ["linear_attention"] * 5 + ["full_attention"]}, [0] * 5 + [None]),
    ],
)
def test_windows(fields, windows):
    model = parse_config(TINY | fields, "tiny")
    assert list(model.windows) == windows
    assert model.held_tokens(100) == [100 if window is None else window for window in windows]
    assert model.held_tokens(5) == [5 if window is None else min(window, 5) for window in windows]


def test_experts_that_a_batch_meets():
    model = parse_config(TINY | {"num_local_experts": 8, "num_experts_per_tok": 2}, "moe")
    one = 3 * 64 * 96
    assert model.read_bytes(1) == pytest.approx((model.dense_weights + 6 * 2 * one) * 2)
    assert model.read_bytes(2) == pytest.approx((model.dense_weights + 6 * (8 - 8 * 0.75**2) * one) * 2)
    assert model.read_bytes(10_000) == pytest.approx(model.weights_bytes)
    assert model.flops_per_token == 2 * (model.dense_weights + 6 * 2 * one)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_attention_heads": None}, "not the configuration of a model with attention: num_attention_heads missing"),
        ({"hidden_size": "wide"}, "hidden_size must be an integer"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
        ({"layer_types": ["full_attention"]}, "each of 6 layers, got 1"),
        ({"intermediate_size": None}, "intermediate_size missing"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
    ],
)
def test_configs_that_are_none(fields, text):
    with pytest.raises(ValueError, match=text):
        parse_config(TINY | fields, "tiny")


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"llama-3.1-8b.*got 'llama-9'"):
        load_model_spec("llama-9")
    for content, text in (("{", "must be a JSON document"), ("[]", "must hold a JSON object, got list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=text):
            load_model_spec(str(tmp_path))


def test_a_calibration_comes_back_as_it_was_written(tmp_path):
    found = Calibration(override(preset_machine("rtx4090"), per_node=3), "3 x some card", "2026-11-25")
    save_calibration(found, tmp_path / "machine.json")
    assert load_calibration(tmp_path / "machine.json") == found


def _without_gpu(document):
    del document["machine"]["gpu"]


def _set(*path, to):
    def change(document):
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_without_gpu, "Machine must have name, gpu"),
        (_set("machine", "gpu", "read_bytes_per_s", to=-1), "read_bytes_per_s must be a positive number, got -1"),
        (_set("machine", "gpu", "launch_s", to=math.inf), "launch_s must be a positive number, got inf"),
        (_set("machine", "inside", "latency_s", to="fast"), "latency_s must be a positive number, got 'fast'"),
        (_set("machine", "inside", "peer_access", to=1), "peer_access must be true or false"),
        (_set("machine", "per_node", to=0), "per_node must be at least 1, got 0"),
        (_set("surplus", to=1), "Calibration must have machine, hardware, date"),
    ],
)
def test_malformed_calibrations_are_refused(change, text, tmp_path):
    file = tmp_path / "machine.json"
    save_calibration(Calibration(preset_machine("h100"), "1 x card", "2026-11-25"), file)
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=text):
        load_calibration(file)
