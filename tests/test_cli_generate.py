"""`tree-attention generate` as a user runs it: answers, figures, invalid options."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, Gemma2Config, LlamaConfig

from command import COMMAND, H_KV, LAYERS, POSITIONS, QUESTION, SMALL, D, H, call, last_json, run, run_as_ranks
from tree_attention import InputError
from tree_attention.cli import models
from tree_attention.cli.models import check_positions, check_step_mode, text_prompt
from tree_attention.cli.options import GenerateOptions, weight_bytes


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(folder, document):
    prompt_tokens, new = len(document.read_bytes()) + 2 + len(QUESTION), 12
    ended = run(
        "generate", "--model", folder, "--file", document, "--prompt", QUESTION, "--nproc", 2,
        "--max-new-tokens", new, "--verify", "--json",
    )  # fmt: skip
    figures = last_json(ended)
    found = figures["verify"]
    assert (found["exact"], found["identical"], found["first_difference"], found["ties"]) == (True, True, None, [])
    assert 0 < found["largest_difference"] < found["rounding"] < 1e-2
    assert len(figures["tokens"]) == figures["new_tokens"] == new
    assert (figures["ranks"], figures["device"], figures["prompt_tokens"]) == (2, "cpu", prompt_tokens)
    assert figures["ttft_s"] > figures["tpot_s"] > 0
    of_token = LAYERS * 2 * H_KV * D * 4
    held = prompt_tokens + new - 1
    for its_bytes in figures["kv_bytes_per_rank"]:  # half, up to a block and the room to grow
        assert held / 2 - 16 <= its_bytes / of_token <= held / 2 + 16 + 64
    assert figures["received_bytes_per_token"] in (LAYERS * H * (D + 1) * 4, 2 * LAYERS * H * (D + 1) * 4)
    for line in (
        rf"read +{prompt_tokens} tokens on 2 ranks \(cpu\)", r"first token +[\d.]+ s",
        rf"wrote +{new} tokens, [\d.]+ ms",
        r"KV cache +[\d.]+, [\d.]+ MB per rank",
        r"received +[\d.]+ kB per token and rank", "one process +writes the same tokens",
    ):  # fmt: skip
        assert re.search(line, ended.stderr), line


@pytest.mark.slow
def test_random_weights_are_timed_and_named(folder, tmp_path):
    """The same on all ranks, for as many tokens as asked for, beyond the positions that the model was made for."""
    arguments = [
        "generate", "--random-weights", "--config", folder / "config.json", "--max-prompt-tokens", POSITIONS,
        "--max-new-tokens", 3, "--json", "--nproc", 2, "--chunk-tokens", 4096,
    ]  # fmt: skip
    ended = run(*arguments, "--extrapolate", "--verify", "--plot", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    figures = last_json(ended)
    assert (figures["random_weights"], figures["prompt_tokens"], figures["new_tokens"]) == (True, POSITIONS, 3)
    assert figures["verify"]["identical"]
    assert "random weights: the times count, the tokens mean nothing" in ended.stderr


@pytest.mark.slow
def test_a_model_without_sdpa_is_verified_by_eager_attention(tmp_path):
    config = Gemma2Config(**SMALL, num_hidden_layers=2, head_dim=D, sliding_window=64)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    ended = run("generate", "--random-weights", "--config", tmp_path / "config.json", "--max-prompt-tokens", 100,
                "--max-new-tokens", 3, "--json", "--nproc", 2, "--verify")  # fmt: skip
    assert last_json(ended)["verify"]["identical"], ended.stderr


@pytest.mark.slow
def test_a_seed_draws_the_same_text_again_and_under_torchrun(folder, document):
    arguments = [
        "generate", "--model", folder, "--file", document, "--prompt", QUESTION, "--max-new-tokens", 24,
        "--sample", "--json", "--seed",
    ]  # fmt: skip
    drawn = last_json(run(*arguments, 5, "--nproc", 2))
    again = json.loads(run_as_ranks(COMMAND, *arguments, 5).splitlines()[-1])
    other = last_json(run(*arguments, 6))
    assert [figures["ranks"] for figures in (drawn, again, other)] == [2, 2, 1]
    assert drawn["tokens"] == again["tokens"] != other["tokens"]


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(capfd, monkeypatch, folder):
    size = weight_bytes(str(folder))
    monkeypatch.setattr(models, "free_bytes", lambda: 2 * size - 1)
    code, _, err = call(capfd, monkeypatch, "generate", "--model", folder, "--prompt", "a", "--nproc", 2)
    assert code == 2
    assert err.startswith(f"tree-attention: the weights of {folder} take 0.0 GB for 2 ranks, and this host has 0.0 GB")
    code, out, _ = call(capfd, monkeypatch, "generate", "--model", folder, "--prompt", "a", "--max-new-tokens", 2)
    assert (code, bool(out)) == (0, True)


@pytest.mark.slow
def test_a_mistake_is_one_line_and_code_2():
    ended = run("generate", "--model", "/nowhere/at/all", "--prompt", QUESTION)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        "tree-attention: model must be a folder or a name on the hub (owner/name), "
        "and '/nowhere/at/all' does not exist\n"
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--model": "{tmp}/absent"}, "absent' does not exist"),
        ({"--model": "absent"}, "must be a folder or a name on the hub"),
        ({"--model": "{tmp}/no_config"}, "no_config must hold a config.json: is it a transformers model?"),
        ({"--model": "{tmp}/no_tokenizer"}, r"no_tokenizer has no tokenizer \(tokenizer.json\): save it there"),
        ({"--file": "{tmp}/absent.txt"}, "absent.txt cannot be read: No such file or directory"),
        ({"--file": "{tmp}"}, "cannot be read: Is a directory"),
        ({"--file": "{tmp}/empty.txt"}, "empty.txt must hold text, and is empty"),
        ({"--file": "{tmp}/latin.txt"}, "latin.txt must be UTF-8 text: .* at byte 4"),
        ({"--model": None}, "give --model and --prompt, or --random-weights with --config and --max-prompt-tokens"),
        ({"--prompt": None}, "give --model and --prompt, or --random-weights"),
        ({"--random-weights": True}, "random-weights needs --config FILE, a model's config.json, and --max-prompt"),
        (
            {"--random-weights": True, "--config": "{tmp}/no_tokenizer/config.json", "--max-prompt-tokens": 9},
            "random-weights reads random tokens: leave out --model, --prompt and --file",
        ),
        ({"--nproc": 0}, "nproc must be at least 1, got 0"),
        ({"--nproc": -2}, "nproc must be at least 1, got -2"),
        ({"--dtype": "float8"}, "dtype must be auto, float32, bfloat16 or float16, got 'float8'"),
        ({"--device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"--max-prompt-tokens": -3}, "max-prompt-tokens must be at least 1, got -3"),
        ({"--max-new-tokens": 0}, "max-new-tokens must be at least 1, got 0"),
        ({"--chunk-tokens": 0}, "chunk-tokens must be at least 1, got 0"),
        (
            {"--sample": True, "--temperature": 0},
            "temperature must be positive, got 0.0: leave out --sample for the most likely",
        ),
        ({"--temperature": 0.5}, "temperature is for sampling: add --sample, or leave it out"),
        ({"--block-tokens": 0}, "block-tokens must be at least 1, got 0"),
    ],
)
def test_mistakes_in_generate(capfd, monkeypatch, tmp_path, folder, change, text):
    for name, file in (("no_config", "tokenizer.json"), ("no_tokenizer", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).symlink_to(folder / file)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    options = {"--model": folder, "--prompt": QUESTION} | change
    words = [name if value is True else f"{name}={value}" for name, value in options.items() if value is not None]
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    code, out, err = call(capfd, monkeypatch, "generate", *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"tree-attention: .*{text}.*\n", err), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capfd, monkeypatch, folder):
    code, _, err = call(capfd, monkeypatch, "generate", "--model", folder, "--prompt", QUESTION, "--device", "cuda")
    assert (code, err) == (2, "tree-attention: cuda needs a GPU for each of 1 ranks, found 0\n")


@pytest.mark.slow
def test_a_mistake_that_the_ranks_find_is_said_once(folder):
    ended = run("generate", "--model", folder, "--prompt", QUESTION, "--nproc", 2, "--max-prompt-tokens", 18)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == "tree-attention: max-prompt-tokens must be at least 19 for this prompt, got 18\n"


@pytest.mark.slow
def test_a_prompt_may_leave_ranks_without_tokens(folder):
    """Here 2 of 3 ranks hold none until the answer reaches them."""
    arguments = ["generate", "--model", folder, "--prompt", "Why?", "--nproc", 3, "--max-new-tokens", 20]
    figures = last_json(run(*arguments, "--verify", "--json"))
    assert figures["verify"]["identical"]
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (4, 20)


def test_more_tokens_than_positions():
    options = GenerateOptions()
    check_positions(options, LlamaConfig(**SMALL), POSITIONS - 128, 128)
    with pytest.raises(InputError, match="has 20000 positions, and 19873 prompt tokens with 128 new ones do not fit"):
        check_positions(options, LlamaConfig(**SMALL), POSITIONS - 127, 128)
    check_positions(replace(options, extrapolate=True), LlamaConfig(**SMALL), POSITIONS, 128)


def test_compiling_is_for_gpus():
    assert check_step_mode(False, torch.device("cpu")) == "captured"
    with pytest.raises(InputError, match="compile is for GPUs, where steps are captured: leave it out"):
        check_step_mode(True, torch.device("cpu"))


def whole(prompt):
    """The text that a session reads, with the question and what is around them."""
    ids, template = prompt.tokenizer.decode(prompt.text), prompt.template
    text = template.opening + ids + template.question(prompt.question, started=True, in_question=True)
    assert prompt.tokens == len(prompt.tokenizer(text, add_special_tokens=False).input_ids)  # a token is a byte
    return text


def test_a_document_is_cut_to_the_limit(folder):
    """What --max-prompt-tokens leaves: the beginning of the document, all of the question."""
    for limit in (22, 23, 60, 100):
        options = GenerateOptions(model=str(folder), prompt=QUESTION, max_prompt_tokens=limit)
        prompt = text_prompt(options, "0123456789" * 50)
        assert prompt.tokens == limit
        assert whole(prompt) == ("0123456789" * 10)[: limit - 21] + "\n\n" + QUESTION
    options = GenerateOptions(model=str(folder), prompt=QUESTION, max_prompt_tokens=21)
    with pytest.raises(InputError, match="max-prompt-tokens must be at least 22 for this prompt, got 21"):
        text_prompt(options, "0123456789")
    assert whole(text_prompt(replace(options, max_prompt_tokens=19), "")) == QUESTION
    with pytest.raises(InputError, match="max-prompt-tokens must be at least 19 for this prompt, got 18"):
        text_prompt(replace(options, max_prompt_tokens=18), "")


def test_a_prompt_is_framed_unless_it_is_plain(folder, tmp_path):
    """Without a document the prompt alone is the message. --plain leaves the token that starts every text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[start])
    tokenizer.save_pretrained(tmp_path / "no_template")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "template")
    for name, plain, document, expected in (
        ("template", False, "", "[Why?]:"),
        ("template", False, "Because.", "[Because.\n\nWhy?]:"),
        ("template", True, "Because.", "<s>Because.\n\nWhy?"),
        ("no_template", False, "", "<s>Why?"),
    ):
        options = GenerateOptions(model=str(tmp_path / name), prompt="Why?", plain=plain)
        prompt = text_prompt(options, document)
        text = prompt.template.opening + prompt.tokenizer.decode(prompt.text)
        assert text + prompt.template.question(prompt.question, started=True, in_question=True) == expected
        assert prompt.tokens == len(prompt.tokenizer(expected, add_special_tokens=False).input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut off", "code"])
def test_damaged_weights_are_one_line(folder, tmp_path, damage):
    damaged = tmp_path / "model"
    shutil.copytree(folder, damaged)
    weights = damaged / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "cut off":
        weights.write_bytes(data[:-1000])
    else:  # a pickle that would run something
        torch.save({"lm_head.weight": shutil.rmtree}, damaged / "pytorch_model.bin")
    ended = run("generate", "--model", damaged, "--prompt", QUESTION, "--max-new-tokens", 2)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"tree-attention: model {damaged} cannot be loaded: ")
    assert ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.slow
def test_a_prompt_shorter_than_the_ranks_is_answered(folder):
    ended = run(
        "generate", "--model", folder, "--plain", "--prompt", "a", "--nproc", 3, "--max-new-tokens", 4, "--verify"
    )
    assert ended.returncode == 0, ended.stderr
