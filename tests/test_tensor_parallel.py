"""A mesh of sequence x tensor: one process's tokens and equal bits on every rank, each with its part of the weights."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from architectures import (
    BLOCK,
    GREEDY,
    NEW_TOKENS,
    OLD,
    TOKENS,
    assert_like_one_process,
    one_process,
    prompt,
    readings,
    tiny,
)
from test_session import TEXT, ask, tokenizer
from test_smollm2 import smollm2
from tree_attention import InputError, TreeAttentionError, Unsupported
from tree_attention.cli.models import load_model
from tree_attention.cost.model import parse_config
from tree_attention.hf import Session, TreeCache, load_tensor_parallel, prefill
from tree_attention.hf.inputs import CACHE
from tree_attention.hf.tensor_parallel import AXES, check_tensor_parallel

# transformers has no plan for the others but two: a step of Llama 4 and dynamic frequencies have tests of their own.
PLANNED = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "deepseek_v3", "qwen3_next", "phi3"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`folder(name)` returns the folder with the tiny model of an architecture."""
    made = {}

    def of(name, layers=4):
        if (name, layers) not in made:
            made[name, layers] = str(tmp_path_factory.mktemp(name))
            tiny(name, "eager", layers).save_pretrained(made[name, layers])
            tokenizer().save_pretrained(made[name, layers])
        return made[name, layers]

    return of


@functools.cache  # a group has three threads, which wake a hundred times a second
def mesh_of(sequence, tensor):
    """Return this rank's mesh; the pool's 4 ranks form several meshes if these are smaller."""
    copies = 4 // (sequence * tensor)
    return init_device_mesh("cpu", (copies, sequence, tensor), mesh_dim_names=("copy", *AXES))[AXES]


def here(weight):
    return weight.to_local() if hasattr(weight, "to_local") else weight


def written(model, mesh, padded, reading, static, step="captured"):
    ids, mask = prompt(padded)
    max_tokens = TOKENS + NEW_TOKENS - 1 if static else None
    cache = TreeCache(model.config, mesh["sequence"], block_tokens=BLOCK, max_tokens=max_tokens, step=step)
    how = {"prefill_chunk_size": 16} if reading == "chunked" else {}
    if reading == "parallel":
        prefill(model, ids, cache, attention_mask=mask if padded else None, chunk_tokens=24)
    out = model.generate(ids, attention_mask=mask, cache=cache, **how, **GREEDY)
    assert bool(cache.captured_steps) == static
    return out.sequences, torch.stack(out.logits)


def on_a_mesh(group, folder, shape, cases):
    mesh = mesh_of(*shape)
    model = load_tensor_parallel(folder, mesh)
    return {case: written(model, mesh, *case) for case in cases}


def assert_cases(results, name, cases):
    for case in cases:
        assert_like_one_process([result[case] for result in results], *one_process(name, case[0]))


@pytest.mark.slow
def test_llama_on_two_by_two_ranks(pool, folder):
    cases = [(False, "parallel", False), (True, "replicated", True)]
    assert_cases(pool.run(on_a_mesh, folder("llama"), (2, 2), cases), "llama", cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (2, 2)) for name in PLANNED), *((name, (1, 2)) for name in PLANNED[::3]), ("llama", (2, 1))],
)
def test_every_architecture_with_a_plan(pool, folder, name, shape):
    ways = readings(name) if shape == (2, 2) else ("replicated",)
    cases = [(False, ways[0], False), *((True, way, True) for way in ways[1:] or ways)]  # (padded, way, static)
    assert_cases(pool.run(on_a_mesh, folder(name), shape, cases), name, cases)


def compiled_whole(group, folder):
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    with mock.patch.object(torch, "compile", compiler):
        mesh = mesh_of(1, 2)
        return written(load_tensor_parallel(folder, mesh), mesh, True, "replicated", True, "compiled")


@pytest.mark.slow
def test_torch_compile_takes_a_step_whole(pool, folder):
    """The graph includes the all-reduces. (Not over the sequence on CPUs, whose link is Python.)"""
    assert_like_one_process(pool.run(compiled_whole, folder("llama", 1)), *one_process("llama", True, layers=1))


def parts(group, folder, shape, drawn):
    """Return this rank's part of each weight, and the heads in the layers of its cache."""
    mesh = mesh_of(*shape)
    model = load_tensor_parallel(AutoConfig.from_pretrained(folder) if drawn else folder, mesh)
    cache = TreeCache(model.config, mesh["sequence"], block_tokens=BLOCK)
    model.generate(prompt(False)[0], cache=cache, max_new_tokens=2)
    weights = {name: here(weight).detach().clone() for name, weight in model.named_parameters()}
    assert not any(weight.is_meta or not weight.isfinite().all() for weight in weights.values())
    return weights, [layer.keys.shape[1] for layer in cache.layers]


@pytest.mark.parametrize("drawn", [False, True])
def test_a_rank_has_its_part_of_the_weights_and_of_the_heads(pool, folder, drawn):
    whole = dict(AutoModelForCausalLM.from_pretrained(folder("llama")).named_parameters())
    results = pool.run(parts, folder("llama"), (2, 2), drawn)
    whole_here = "model.embed_tokens.weight" if OLD else None
    for rank, (weights, heads) in enumerate(results):
        assert heads == [1] * 4
        for name, weight in weights.items():
            split = weight.ndim > 1 and name != whole_here
            assert weight.numel() * (2 if split else 1) == whole[name].numel(), name
            assert torch.equal(weight, results[rank % 2][0][name]), "the sequence's ranks have the same weights"
    if not drawn:
        for name in ("model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):
            assert torch.equal(torch.cat([results[0][0][name], results[1][0][name]]), whole[name])


def drawn_tokens(group, folder, use_cache):
    """Sample with the automatic cache and a different seed on each rank."""
    ids, mask = prompt(padded=True)
    rank = group.rank() if group else 0
    model = load_tensor_parallel(folder, mesh_of(2, 2)) if group else tiny("llama", "eager")
    torch.manual_seed(100 + rank)
    out = model.generate(ids, attention_mask=mask, **GREEDY | {"do_sample": True, "use_cache": use_cache})
    if group and use_cache:
        assert out[CACHE].ranks.group.size() == 2
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_seed_takes_ranks_apart(pool, folder, use_cache):
    results = pool.run(drawn_tokens, folder("llama"), use_cache)
    assert_like_one_process(results, *drawn_tokens(None, None, use_cache))


def with_other_rounding(group, folder):
    """The second half of the sequence axis rounds differently, as another group's all-reduce may."""
    mesh = mesh_of(2, 2)
    model = load_tensor_parallel(folder, mesh)
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 2e-7 * mesh.get_local_rank("sequence"))
    plain = model.model(prompt(False)[0]).last_hidden_state.detach().sum()
    return written(model, mesh, False, "replicated", False), plain


def test_logits_have_the_same_bits_however_groups_add(pool, folder):
    results = pool.run(with_other_rounding, folder("llama"))
    assert len({float(plain) for _, plain in results}) > 1, "nothing to make equal"
    assert_like_one_process([result[0] for result in results], *one_process("llama", False))


def refused(group, folder):
    """Return the texts of the errors, which must be the same on every rank."""
    mesh, texts = mesh_of(2, 2), []
    model = load_tensor_parallel(folder, mesh)
    ids = prompt(False)[0]

    def with_cache(group, call):
        return lambda: call(TreeCache(model.config, group, block_tokens=BLOCK))

    for call in (
        lambda: TreeCache(model.config),
        with_cache(mesh["tensor"], lambda cache: model.generate(ids, cache=cache, max_new_tokens=2)),
        with_cache(group, lambda cache: prefill(model, ids, cache)),
        lambda: load_tensor_parallel(folder, init_device_mesh("cpu", (2, 2), mesh_dim_names=("tensor", "sequence"))),
    ):
        with pytest.raises(TreeAttentionError) as error:
            call()
        texts.append(str(error.value))
    return texts


def test_wrong_ranks_are_refused(pool, folder):
    results = pool.run(refused, folder("llama"))
    assert [texts[0] for texts in results] == [results[0][0]] * 4
    for texts in results:
        assert texts[0].startswith("the model is split over 2 ranks: say which ranks hold the same heads, ")
        assert "the ranks of a cache must hold the same heads, but the model is split over [" in texts[1]
        assert texts[2].startswith("the ranks of a cache must hold the same heads, but the model is split over [")
        assert texts[3] == "mesh must have the axes ('sequence', 'tensor'), got ('tensor', 'sequence')"


@pytest.mark.parametrize(
    ("name", "ranks", "error", "text"),
    [
        ("llama", 0, InputError, "needs at least 1 rank, got 0"),
        ("llama", 4, InputError, "goes up to the KV heads, 2 here, got 4 ranks: .* use the other ranks for the seq"),
        ("deepseek_v3", 3, InputError, "4 heads and 4 KV heads must divide by the tensor-parallel ranks, got 3"),
        ("gpt_oss", 2, Unsupported, "has no tensor-parallel plan for gpt_oss: leave its weights whole"),
    ],
)
def test_models_that_cannot_be_split(name, ranks, error, text):
    with pytest.raises(error, match=text):
        check_tensor_parallel(tiny(name, "eager").config, ranks)


@pytest.mark.parametrize(("name", "heads"), [("llama", (32, 8)), ("llama", (24, 8)), ("deepseek_v3", (12, 12))])
def test_the_planner_knows_how_a_model_can_be_split(name, heads):
    config = tiny(name, "eager").config
    config.num_attention_heads, config.num_key_value_heads = heads
    for ranks in range(1, 34):
        try:
            check_tensor_parallel(config, ranks)
        except InputError:
            assert not parse_config(config.to_dict(), name).can_split(ranks)
        else:
            assert parse_config(config.to_dict(), name).can_split(ranks)


def talk(group, folder, shape, save, name="llama"):
    """Ask two questions, and save the session in between."""
    model = load_tensor_parallel(folder, mesh_of(*shape)) if shape else tiny(name, "tree_attention")
    session = Session.open(model, tokenizer(), block_tokens=BLOCK) if shape else Session.open(model, tokenizer(), group)
    session.read(TEXT, chunk_tokens=64)
    first = ask(session, "What is this?")
    if save:
        session.save(save)
    return first, ask(session, "And now?")


def goes_on(group, folder, shape, save):
    model = load_tensor_parallel(folder, mesh_of(*shape))
    try:
        return ask(Session.load(save, model, tokenizer()), "And now?")
    except InputError as error:
        return str(error).replace(save, "SAVE")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_save_is_taken_up_on_other_ranks_of_the_sequence(pool, folder, tmp_path, name):
    save = str(tmp_path / "save")
    expected = talk(None, None, None, None, name)
    assert pool.run(talk, folder(name), (2, 2), save) == [expected] * 4
    windows = sum(kind == "sliding_attention" for kind in getattr(tiny(name, "eager").config, "layer_types", []))
    files = list(tmp_path.glob("save/*/layer-*-tensor-1.safetensors"))
    assert len(files) == 2 * (4 - windows) + windows
    for shape in ((2, 2), (1, 2)):
        assert pool.run(goes_on, folder(name), shape, save) == [expected[1]] * 4
    [text] = set(pool.run(goes_on, folder(name), (2, 1), save))
    assert text == (
        "the save in SAVE is of a model split over 2 ranks by tensor parallelism, and has a file for the heads "
        "of each; this model is split over 1: load it over 2"
    )


def half_a_disk(group, folder, save):
    """The second save fails on one rank, which has the second half of the heads."""
    from tree_attention.hf import save as saving

    session = Session.open(load_tensor_parallel(folder, mesh_of(2, 2)), tokenizer(), block_tokens=BLOCK)
    session.read(TEXT)
    session.save(save)
    kept = ask(session, "And now?")
    write = mock.patch.object(saving, "write_file", side_effect=OSError(28, "No space left on device"))
    try:
        if group.rank() == 3:
            with write:
                session.save(save)
        else:
            session.save(save)
    except TreeAttentionError as error:
        return str(error).replace(save, "SAVE"), kept


@pytest.mark.slow
def test_a_save_is_whole_over_both_axes_or_none(pool, folder, tmp_path):
    save = str(tmp_path / "save")
    results = pool.run(half_a_disk, folder("llama"), save)
    text = "not saved, rank 1 cannot write to SAVE: No space left on device; a save that was there before is as it was"
    assert results == [(text, results[0][1])] * 4
    assert pool.run(goes_on, folder("llama"), (2, 2), save) == [results[0][1]] * 4


COMMAND = Path(sys.executable).with_name("tree-attention")


def command(*arguments, lines=""):
    arguments = [COMMAND, *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, input=lines)


def last_json(ended):
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
def test_generate_on_the_command_line(folder):
    """A mesh of 2 x 2 ranks samples what one process samples with that seed."""
    ended = command(
        "generate", "--model", folder("llama"), "--prompt", "x" * 100, "--nproc", 4, "--tensor-parallel", 2, "--sample",
        "--max-new-tokens", 8, "--device", "cpu", "--block-tokens", 4, "--verify", "--json",
    )  # fmt: skip
    figures = last_json(ended)
    assert (figures["ranks"], figures["tensor_parallel"]) == (4, 2)
    assert figures["verify"]["identical"]
    of_token = 4 * 2 * 16 * 4  # layers, K and V, head dim, bytes; one of the 2 KV heads
    for its_bytes in figures["kv_bytes_per_rank"]:
        assert 48 <= its_bytes / of_token <= 56 + 64
    assert "on 4 ranks (cpu), heads and weights over 2 of them" in ended.stderr


@pytest.mark.slow
def test_bench_steps_on_the_command_line(folder):
    """Random weights: each rank reads its part of them, and one of two KV heads of all tokens."""
    ended = command(
        "bench", "steps", "--config", Path(folder("llama")) / "config.json", "--contexts", 64, "--tokens", 4,
        "--nproc", 2, "--tensor-parallel", 2, "--device", "cpu", "--ways", "ours captured",
    )  # fmt: skip
    found = last_json(ended)
    assert (found["tensor_parallel"], [each["what"] for each in found["records"]]) == (2, ["ours captured"])
    weights = dict(AutoModelForCausalLM.from_pretrained(folder("llama")).named_parameters())
    norms = sum(weight.numel() for weight in weights.values() if weight.ndim == 1)
    split = sum(weight.numel() for name, weight in weights.items() if weight.ndim > 1 and "embed" not in name)
    for each in found["records"]:
        assert each["bytes"] == (norms + split / 2 + 64 * 4 * 2 * 16) * 4


def refused_by_the_command_line(group, folder):
    texts = []
    for ranks in (0, 8):
        with pytest.raises(TreeAttentionError) as error:
            load_model(folder, "auto", torch.device("cpu"), tensor_parallel=ranks)
        texts.append(str(error.value))
    six = AutoConfig.for_model("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    six.save_pretrained(f"{folder}/six-{group.rank()}")
    with pytest.raises(TreeAttentionError) as error:
        load_model(f"{folder}/six-{group.rank()}", "auto", torch.device("cpu"), random=True, tensor_parallel=3)
    return [*texts, str(error.value)]


def test_nproc_is_a_product(pool, folder):
    for texts in pool.run(refused_by_the_command_line, folder("deepseek_v3")):
        assert texts[0] == "tensor parallelism needs at least 1 rank, got 0"
        assert texts[1].startswith("tensor parallelism goes up to the KV heads, 4 here, got 8 ranks")
        assert texts[2] == "nproc must be a multiple of tensor-parallel, got 4 and 3: start a multiple of 3 ranks"


@pytest.mark.model
def test_smollm2_over_its_three_kv_heads():
    """Each rank has a third of the 9 heads; the word embedding is also the output weight."""
    ended = command(
        "generate", "--model", smollm2.fetch(), "--prompt", smollm2.topics["assert"], "--nproc", 3,
        "--tensor-parallel", 3, "--max-new-tokens", 12, "--device", "cpu", "--verify", "--json",
    )  # fmt: skip
    assert last_json(ended)["verify"]["identical"]
