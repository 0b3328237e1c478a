"""The plan: memory and verdicts by hand, and the commands `plan` and `calibrate` as a user runs them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tree_attention.cli.app import app
from tree_attention.cli.plots import short
from tree_attention.cost.decode import AttentionShape, RankGroup, all_reduce_cost, decode_cost
from tree_attention.cost.machine import Calibration, load_calibration, override, preset_machine, save_calibration
from tree_attention.cost.mesh import HOST_S, RESERVED_BYTES, estimate_first_token_s, estimate_mesh
from tree_attention.cost.model import load_model_spec, parse_config
from tree_attention.cost.plan import make_plan, over_contexts

LLAMA, H200 = load_model_spec("llama-3.1-8b"), preset_machine("h200")
M = 1 << 20
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 96}


def run(*arguments):
    ended = CliRunner().invoke(app, list(map(str, arguments)))
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended


def planned(*arguments):
    ended = run("plan", *arguments, "--json")
    assert ended.exit_code == 0, ended.stderr
    return json.loads(ended.stdout)


def test_memory_of_a_mesh():
    mesh = estimate_mesh(LLAMA, H200, M, 4, 8, 2)
    assert mesh.weights_bytes == pytest.approx(16.06e9 / 8, rel=1e-3)
    assert mesh.kv_bytes == 4 * M * 32 * 4096 / 16
    assert RESERVED_BYTES < mesh.workspace_bytes < 7e9  # 4 x 32768 tokens a chunk
    assert mesh.fits
    assert not estimate_mesh(
        LLAMA, replace(H200, gpu=replace(H200.gpu, memory_bytes=mesh.used_bytes - 1)), M, 4, 8, 2
    ).fits


def test_a_token_is_weights_keys_and_launches():
    parts = estimate_mesh(LLAMA, H200, M, 1, 1, 2).parts_s
    layer = decode_cost(AttentionShape(1, 32, 8, 128, M / 2), H200, 2)
    assert parts["KV"] == pytest.approx(32 * layer.read_s)
    assert parts["exchange"] == pytest.approx(32 * layer.exchange_s)
    assert parts["weights"] == pytest.approx(7.505e9 * 2 / 4.57e12, rel=1e-3)
    assert parts["tensor"] == 0
    assert parts["launches"] == pytest.approx(32 * (8e-6 + (4 + 5) * 3e-6) + 3e-6)
    assert parts["host"] == HOST_S


def test_a_batch_has_a_launch_for_each_product():
    parts = estimate_mesh(LLAMA, H200, M, 2, 1, 2).parts_s
    assert parts["launches"] == pytest.approx(32 * (8 * 8e-6 + 5 * 3e-6) + 8e-6)


def test_sums_go_through_peer_memory_where_it_is_and_they_fit():
    def tensor_s(batch=1, ranks=2, **links):
        return estimate_mesh(LLAMA, override(H200, **links), 1024, batch, ranks, 1).parts_s["tensor"] / 64

    assert tensor_s() == pytest.approx(3e-6 + 1.5e-6 + 8 * 4096 / 321e9)
    assert tensor_s(ranks=4) == pytest.approx(3e-6 + 1.5e-6 + 3 * 8 * 4096 / 321e9)
    for batch, ranks in ((64, 2), (9, 8)):  # the largest, which is not slower than NCCL's
        assert tensor_s(batch, ranks) <= all_reduce_cost(2 * batch * 4096, H200, RankGroup(ranks, 8))[0]
    for batch, ranks, links in (
        (65, 2, {}), (10, 8, {}), (1, 2, {"inside": "infinity-fabric"}), (1, 2, {"per_node": 1})
    ):  # fmt: skip
        where = override(H200, **links)
        expected = all_reduce_cost(2 * batch * 4096, where, RankGroup(ranks, where.per_node))[0]
        assert tensor_s(batch, ranks, **links) == pytest.approx(expected), (batch, ranks, links)


def test_keys_are_divided_by_tensor_ranks_up_to_the_kv_heads_only():
    by = {
        mesh.tensor: mesh for mesh in make_plan(LLAMA, H200, context=M, batch=1, gpus=16).meshes if mesh.sequence == 1
    }
    assert by[8].kv_bytes == by[16].kv_bytes == by[1].kv_bytes / 8
    assert by[16].parts_s["KV"] == by[8].parts_s["KV"]
    assert by[16].weights_bytes == by[8].weights_bytes / 2
    (note,) = [note for note in make_plan(LLAMA, H200, context=M, batch=1, gpus=16).notes if "KV head" in note]
    assert "more tensor ranks than the 8 KV head(s)" in note


def test_windows_stay_whole_on_every_sequence_rank():
    model = parse_config(
        TINY | {"sliding_window": 1000, "layer_types": ["sliding_attention", "full_attention"]}, "tiny"
    )
    mesh = estimate_mesh(model, H200, 8000, 1, 1, 4)
    assert mesh.kv_bytes == (1000 + 2000) * model.key_bytes
    assert mesh.parts_s["KV"] == pytest.approx(3000 * model.key_bytes / H200.gpu.read_bytes_per_s)


def test_with_windows_alone_the_search_for_a_context_ends():
    model = parse_config(TINY | {"sliding_window": 1000}, "tiny")
    assert make_plan(model, H200, context=M, batch=1, gpus=2).pays_from_tokens is None
    assert over_contexts(model, H200, batch=1, gpus=2)[-1][0] == 1 << 30


def test_kv_heads_that_do_not_divide_evenly():
    """6 KV heads over 4 tensor ranks: two ranks have 2, and these decide."""
    model = parse_config(TINY | {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16}, "tiny")
    assert estimate_mesh(model, H200, 1000, 1, 4, 1).kv_bytes == 2 * 1000 * 2 * 2 * 16 * 2


def test_the_meshes_are_all_that_there_are():
    meshes = make_plan(LLAMA, preset_machine("h200", per_node=4), context=1024, batch=1, gpus=8).meshes
    assert [(mesh.tensor, mesh.sequence) for mesh in meshes] == [
        (1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1),
    ]  # fmt: skip
    assert {mesh.algorithm for mesh in meshes if mesh.gpus <= 4 and mesh.sequence > 1} == {"fused"}
    assert "fused" not in {mesh.algorithm for mesh in meshes if mesh.gpus == 8}


def test_tensor_ranks_that_heads_do_not_divide_by_are_left_out_with_a_word():
    made = make_plan(LLAMA, preset_machine("h200", per_node=6), context=1024, batch=1, gpus=6)
    assert {mesh.tensor for mesh in made.meshes} == {1, 2}
    assert any("3, 6 tensor ranks are left out: they do not divide 32 query heads" in note for note in made.notes)


@pytest.mark.parametrize("gpu", ["rtx4090", "mi300x"])
def test_without_peer_access_nothing_is_fused(gpu):
    meshes = make_plan(LLAMA, preset_machine(gpu), context=1024, batch=1, gpus=2).meshes
    assert [mesh.algorithm for mesh in meshes] == ["none", "all_gather", "none"]


@pytest.mark.parametrize("context", [8192, M])
def test_nothing_is_chosen_that_cannot_be_loaded(context):
    """4 KV heads: 8 tensor ranks are shown, and would be the fastest on short contexts, but not here."""
    made = make_plan(load_model_spec("qwen3-30b-a3b"), H200, context=context, batch=4, gpus=8)
    assert {mesh.tensor for mesh in made.meshes if not mesh.loadable} == {8}
    assert made.fewest is not None
    assert made.fastest is not None
    assert max(made.fewest.tensor, made.fastest.tensor) <= 4
    assert "8 x 1" not in made.verdict
    assert any("Only other engines support that: not chosen" in note for note in made.notes)


def test_fewest_and_fastest():
    made = make_plan(LLAMA, H200, context=M, batch=4, gpus=16)
    fitting = [mesh for mesh in made.meshes if mesh.fits]
    assert made.fewest is not None
    assert made.fastest is not None
    assert made.fewest.gpus == min(mesh.gpus for mesh in fitting)
    fastest_s = min(mesh.token_s for mesh in fitting)
    assert made.fastest.token_s <= 1.03 * fastest_s
    assert made.fastest.gpus == min(mesh.gpus for mesh in fitting if mesh.token_s <= 1.03 * fastest_s)


@pytest.mark.parametrize(
    ("model", "context", "batch", "gpus", "verdict"),
    [
        ("llama-3.1-8b", 8192, 1, 8, "Use tensor parallelism only (8 GPUs)"),
        ("llama-3.1-8b", M, 4, 16, "Shard the sequence: 13."),
        ("llama-3.1-70b", M, 4, 16, "Shard the sequence: no mesh without sequence sharding has enough memory."),
        ("llama-3.1-8b", 1024, 1, 1, "One GPU is enough"),
        ("deepseek-v3", 1024, 1, 2, "Nothing fits: 2 x 1 still needs 33"),
    ],
)
def test_verdicts(model, context, batch, gpus, verdict):
    made = make_plan(load_model_spec(model), H200, context=context, batch=batch, gpus=gpus)
    assert made.verdict.startswith(verdict)
    assert (made.fewest is None) == verdict.startswith("Nothing")


@pytest.mark.parametrize(("model", "gpus"), [("llama-3.1-8b", 16), ("deepseek-v3", 16), ("llama-3.1-70b", 16)])
def test_sharding_pays_from_the_context_on_that_is_named(model, gpus):
    def fastest_shards(context):
        fastest = make_plan(load_model_spec(model), H200, context=context, batch=1, gpus=gpus).fastest
        assert fastest is not None
        return fastest.sequence > 1

    found = make_plan(load_model_spec(model), H200, context=1024, batch=1, gpus=gpus).pays_from_tokens
    assert found is not None
    assert fastest_shards(found)
    assert fastest_shards(2 * found)
    assert not fastest_shards(found * 31 // 32)


def test_where_it_never_pays_none_is_named():
    assert make_plan(LLAMA, H200, context=1024, batch=1, gpus=2).pays_from_tokens is None


def test_over_contexts_ends_where_nothing_fits():
    rows = over_contexts(LLAMA, H200, batch=1, gpus=2)
    assert [context for context, _, _ in rows] == [1 << i for i in range(10, 10 + len(rows))]
    assert make_plan(LLAMA, H200, context=rows[-1][0], batch=1, gpus=2).fewest is not None
    assert make_plan(LLAMA, H200, context=2 * rows[-1][0], batch=1, gpus=2).fewest is None


def test_the_first_token_takes_the_arithmetic_at_least():
    for tensor, sequence in ((1, 1), (2, 1), (1, 2), (4, 4)):
        mesh = estimate_mesh(LLAMA, H200, 131072, 1, tensor, sequence)
        flops = 131072 * (2 * 6.98e9 + 2 * 32 * 256 * 131072 / 2 * 32)
        least_s = flops / mesh.gpus / H200.gpu.matmul_flops_per_s
        assert least_s < estimate_first_token_s(LLAMA, H200, 131072, 1, mesh) < 2 * least_s


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("131072", 131072), ("128k", 131072), ("1M", M), ("1.5m", 3 * M // 2), ("1e6", 10**6), ("1_000", 1000)],
)
def test_contexts(text, tokens):
    assert planned("--model", "llama-3.1-8b", "--context", text, "--gpu", "h200")["context_tokens"] == tokens


def test_the_command_prints_a_table_and_a_verdict():
    ended = run("plan", "--model", "llama-3.1-8b", "--context", "1M", "--batch", 4, "--gpu", "h200", "--gpus", 16)
    assert ended.exit_code == 0
    for text in ("8 x 2", "two_level", "too large", "fewest GPUs: 8 x 1", "Shard the sequence", "131072 positions"):
        assert text in ended.stdout


def test_nothing_fits_is_exit_code_1():
    ended = run("plan", "--model", "deepseek-v3", "--context", "1k", "--gpu", "h100", "--gpus", 1)
    assert ended.exit_code == 1
    assert "Nothing fits" in ended.stdout


GOOD = {"--model": "llama-3.1-8b", "--context": "1M", "--gpu": "h200", "--gpus": "8"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--context": "0"}, "context, batch and gpus must be at least 1, got 0, 1 and 8"),
        ({"--context": "1__"}, "context must be a number such as 131072, 128k, 1M or 1e6, got '1__'"),
        ({"--context": "1.3"}, "context must be a number such as 131072, 128k, 1M or 1e6, got '1.3'"),
        ({"--context": "1e999"}, "context must be a number such as 131072, 128k, 1M or 1e6, got '1e999'"),
        ({"--context": "long"}, "context must be a number such as 131072, 128k, 1M or 1e6, got 'long'"),
        ({"--batch": "0"}, "at least 1, got 1048576, 0 and 8"),
        ({"--gpus": "12"}, "gpus must fit one node of 8 or fill whole nodes, got 12"),
        ({"--gpu": "h300"}, "GPU must be one of h100, h200, b200, mi300x, a100, rtx4090, got 'h300'"),
        ({"--gpu": None}, "name one of --gpu"),
        ({"--machine": "m.json"}, "name one of --gpu"),
        ({"--gpu": None, "--machine": "nowhere.json"}, "machine nowhere.json cannot be read: No such file"),
        ({"--per-node": "0"}, "per-node must be at least 1, got 0"),
        ({"--across": "pigeon"}, "link must be one of"),
        ({"--model": "llama-9"}, "model must be one of deepseek-v3, llama-3.1-70b, llama-3.1-8b, qwen3-30b"),
        (
            {"--plot": "nowhere/plan.png"},
            "plot must be a file in a folder that can be written to, got",
        ),
    ],
)
def test_usage_that_cannot_be(change, text):
    options = {name: value for name, value in (GOOD | change).items() if value is not None}
    ended = run("plan", *(part for option in options.items() for part in option))
    assert ended.exit_code == 2
    assert ended.stderr.startswith("tree-attention: ")
    assert text in ended.stderr


def test_a_config_without_attention_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}')
    ended = run("plan", "--model", tmp_path, "--context", "1k", "--gpu", "h100")
    assert ended.exit_code == 2
    assert "not the configuration of a model with attention: num_attention_heads missing" in ended.stderr


def test_a_calibration_is_used_and_named(tmp_path):
    slow = preset_machine("h200")
    slow = replace(slow, gpu=replace(slow.gpu, read_bytes_per_s=slow.gpu.read_bytes_per_s / 2))
    save_calibration(Calibration(slow, "8 x some other card", "2026-11-25"), tmp_path / "m.json")
    with_it = planned("--model", "llama-3.1-8b", "--context", "1M", "--machine", tmp_path / "m.json")
    without = planned("--model", "llama-3.1-8b", "--context", "1M", "--gpu", "h200")
    assert with_it["notes"][-1] == "constants measured on 8 x some other card, 2026-11-25"
    assert with_it["meshes"][0]["parts_s"]["KV"] == pytest.approx(2 * without["meshes"][0]["parts_s"]["KV"])
    other = planned("--model", "llama-3.1-8b", "--context", "1M", "--machine", tmp_path / "m.json", "--inside", "pcie5")
    assert other["machine"]["inside"]["name"] == "pcie5"


def test_a_plot(tmp_path):
    planned("--model", "llama-3.1-8b", "--context", "1M", "--gpu", "h200", "--plot", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    of_experts = "--model", "qwen3-30b-a3b", "--context", "1M", "--batch", 4, "--gpu", "h200"
    pays_from = planned(*of_experts, "--plot", tmp_path / "plan.svg")["pays_from_tokens"]
    assert f"sequence sharding pays from {short(pays_from)} tokens on" in (tmp_path / "plan.svg").read_text()


def test_planning_loads_neither_torch_nor_transformers():
    """So it answers in well under a second."""
    code = (
        "import sys\nfrom tree_attention.cli.app import app\n"
        "app('plan --model llama-3.1-8b --context 1M --gpu h200 --gpus 16'.split(), standalone_mode=False)\n"
        "print(*[name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], 'are loaded')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "are loaded"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--nproc", 1), "needs at least 2 ranks, got 1"),
        (
            ("--output", "nowhere/m.json"),
            "output must be a file in a folder that can be written to, got nowhere/m.json",
        ),
        (("--device", "abacus"), "device must be auto, cpu or cuda, got 'abacus'"),
    ],
)
def test_calibrate_refuses(arguments, text):
    ended = run("calibrate", *arguments)
    assert ended.exit_code == 2
    assert text in ended.stderr


def test_calibrate_writes_a_file(tmp_path):
    ended = run("calibrate", "--device", "cpu", "--output", str(tmp_path))
    assert ended.exit_code == 2
    assert "output must be a file in a folder that can be written to" in ended.stderr


def test_calibrate_does_not_take_the_cpu_for_a_lonely_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    ended = run("calibrate")
    assert ended.exit_code == 2
    assert "found one GPU: --device cpu" in ended.stderr


@pytest.mark.slow
def test_calibrate_measures_what_plan_takes(tmp_path):
    command = Path(sys.executable).with_name("tree-attention")
    arguments = ["calibrate", "--device", "cpu", "--output", tmp_path / "m.json"]
    ended = subprocess.run([command, *arguments], capture_output=True, text=True, check=True, timeout=300)
    assert "streaming read" in ended.stdout
    found = load_calibration(tmp_path / "m.json")
    assert found.hardware.startswith("2 x ")
    assert "not measured" in found.machine.across.source
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    notes = planned("--model", tmp_path, "--context", "1k", "--machine", tmp_path / "m.json", "--gpus", 2)["notes"]
    assert notes == [f"constants measured on {found.hardware}, {found.date}"]
