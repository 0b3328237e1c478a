"""The command as a user runs it: answers, figures, mistakes, a rank that dies, Ctrl-C."""

import atexit
import contextlib
import io
import json
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tree_attention.cli
from tree_attention import InputError, Unsupported
from tree_attention.bench.steps import measure
from tree_attention.cli.chat import _hand_over, typed
from tree_attention.cli.exits import say
from tree_attention.cli.inputs import check_positions, prompt_ids, step_of
from tree_attention.cli.launch import run_on_ranks
from tree_attention.hf import Session
from tree_attention.local import BACKENDS
from tree_attention.reduce import ALGORITHMS

COMMAND = Path(sys.executable).with_name("tree-attention")
TORCHRUN = Path(sys.executable).with_name("torchrun")
POSITIONS = 20_000
LAYERS, H, H_KV, D = 2, 4, 2, 16
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": H,
    "num_key_value_heads": H_KV, "max_position_embeddings": POSITIONS, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QUESTION = "What is this about?"


def write_model(folder, layers):
    """A llama with random weights that never ends its text, and its tokenizer; a token is a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_hidden_layers=layers)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, LAYERS)
    return folder


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "document.txt"
    file.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(18)), encoding="utf-8")
    return file


def run(*arguments, command=(COMMAND,), timeout_s=120, lines=""):
    arguments = [*command, *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout_s, check=False, input=lines)


def opened(folder):
    """A session of this process alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tree_attention")
    return Session.open(model, AutoTokenizer.from_pretrained(folder))


def last_json(ended):
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(folder, document):
    prompt_tokens, new = len(document.read_bytes()) + 2 + len(QUESTION), 12
    ended = run(
        "generate", "--model", folder, "--file", document, "--prompt", QUESTION, "--nproc", 2,
        "--max-new-tokens", new, "--verify", "--json",
    )  # fmt: skip
    figures = last_json(ended)
    assert figures["verify"] == {
        "identical": True, "first_difference": None, "one_process_tokens": figures["tokens"],
    }  # fmt: skip
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
        r"KV cache +[\d.]+, [\d.]+ MB a rank", r"received +[\d.]+ kB a token", "one process +writes the same tokens",
    ):  # fmt: skip
        assert re.search(line, ended.stderr), line


@pytest.mark.slow
def test_random_weights_are_timed_and_named(folder):
    """The same on all ranks, for as many tokens as asked for, beyond the positions that the model was made for."""
    arguments = [
        "generate", "--random-weights", "--config", folder / "config.json", "--max-prompt-tokens", POSITIONS,
        "--max-new-tokens", 3, "--json", "--nproc", 2, "--chunk-tokens", 4096,
    ]  # fmt: skip
    ended = run(*arguments, "--extrapolate", "--verify")
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
    torchrun = (TORCHRUN, "--no-python", "--standalone", "--nproc-per-node", "2", COMMAND)
    drawn = last_json(run(*arguments, 5, "--nproc", 2))
    again = last_json(run(*arguments, 5, command=torchrun))
    other = last_json(run(*arguments, 6))
    assert [figures["ranks"] for figures in (drawn, again, other)] == [2, 2, 1]
    assert drawn["tokens"] == again["tokens"] != other["tokens"]


@pytest.mark.slow
def test_a_chat_is_put_away_and_taken_up_on_other_ranks(folder, document, tmp_path):
    arguments = ["chat", "--model", folder, "--max-new-tokens", 9]
    session = opened(folder)
    session.read(document.read_text())
    answers = ["".join(session.ask(question, max_new_tokens=9)) for question in ("What?", "Who?", "When?")]
    begun = run(*arguments, "--file", document, "--nproc", 2, "--save", tmp_path / "save", lines="What?\n\nWho?\n")
    assert begun.returncode == 0, begun.stderr
    torchrun = (TORCHRUN, "--no-python", "--standalone", "--nproc-per-node", "3", COMMAND)
    ended = run(*arguments, "--load", tmp_path / "save", lines="When?\n", command=torchrun)
    assert ended.returncode == 0, ended.stderr
    assert begun.stdout + ended.stdout == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.slow
def test_a_chat_survives_a_question_that_does_not_fit(folder):
    arguments = ["chat", "--model", folder, "--max-new-tokens", 9, "--max-tokens", 40, "--nproc", 2]
    ended = run(*arguments, lines=f"{'x' * 40}\nWho?\n")
    assert ended.returncode == 0
    assert ended.stderr.startswith(
        "tree-attention: this TreeCache has room for 40 tokens over all ranks, 50 are needed"
    )
    answer = "".join(opened(folder).ask("Who?", max_new_tokens=9))
    assert ended.stdout == f"\n{answer}\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_chat_reads_what_is_no_text_too(monkeypatch, errors):
    pipe = io.TextIOWrapper(io.BytesIO(b"What?\n\xff\xfe\nWho?"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", pipe)
    assert list(typed()) == ["What?\n", "\ufffd\ufffd\n", "Who?"]


@pytest.mark.parametrize("stdin", [None, mock.Mock(readline=mock.Mock(side_effect=OSError))], ids=["closed", "broken"])
def test_a_chat_ends_where_stdin_does(monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    lines = queue.SimpleQueue()
    with contextlib.suppress(OSError):
        _hand_over(lines)
    assert lines.get_nowait() is None


def test_to_say_something_to_nobody_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        say("What?")
        say("Who?")


@pytest.mark.slow
def test_bench_steps_times_every_way(folder, tmp_path):
    output = tmp_path / "records.jsonl"
    ways = ["ours eager", "ours captured", "stock eager"]
    ended = run(
        "bench", "steps", "--config", folder / "config.json", "--contexts", "700,64", "--tokens", 4, "--nproc", 2,
        "--ways", ",".join(ways), "--device", "cpu", "--output", output,
    )  # fmt: skip
    records = last_json(ended)["records"]
    assert [(each["context_tokens"], each["what"]) for each in records] == [(n, way) for n in (64, 700) for way in ways]
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
    ended = run(*arguments, "--contexts", "512,64", "--chunk-tokens", 128, "--rounds", 2, "--output", output)
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
    assert err.endswith("tree-attention: ways must be all or some of ours, stock, got 'theirs'\n")


def test_bench_steps_refuses_what_it_cannot_fill():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, num_hidden_layers=2, head_dim=D, sliding_window=64))
    with pytest.raises(Unsupported, match="attention only, this model has DynamicSlidingWindowLayer: use generate"):
        measure(model, [64], ["ours eager"], tokens=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--config", "absent.json"], "config must be a model's config.json, got absent.json"),
        (["--contexts", 0], "contexts, nproc and tokens must be at least 1, got 0, 2 and 32"),
        (
            ["--ways", "ours,stock eager"],
            "ways must be all or some of ours eager, ours captured, ours compiled, ",
        ),
    ],
)
def test_mistakes_in_bench_steps(capfd, monkeypatch, folder, options, text):
    options = ["--config", folder / "config.json", *options]
    code, out, err = call(capfd, monkeypatch, "bench", "steps", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"tree-attention: {text}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--load", "{tmp}"], "{tmp} holds no save: there is no current.json"),
        (["--file", "{tmp}/absent.txt"], "file {tmp}/absent.txt cannot be read: No such file or directory"),
        (["--max-tokens", 0], "max-tokens, max-new-tokens, chunk-tokens and block-tokens must be at least 1"),
        (["--dtype", "int8"], "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        (["--nproc", 0], "nproc must be at least 1, got 0"),
    ],
)
def test_mistakes_in_chat(capfd, monkeypatch, tmp_path, folder, options, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    options = [str(option).replace("{tmp}", str(tmp_path)) for option in options]
    code, out, err = call(capfd, monkeypatch, "chat", "--model", folder, *options)
    assert (code, out, err) == (2, "", f"tree-attention: {text.replace('{tmp}', str(tmp_path))}\n")


def test_a_mistake_is_one_line_and_code_2():
    ended = run("generate", "--model", "/nowhere/at/all", "--prompt", QUESTION)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        "tree-attention: model must be a folder or a name on the hub (owner/name), "
        "and '/nowhere/at/all' does not exist\n"
    )


def call(capfd, monkeypatch, *arguments):
    """The console script's function in this process, which saves loading torch: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["tree-attention", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        tree_attention.cli.main()
    return end.value.code, *capfd.readouterr()


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
        (
            {"--max-prompt-tokens": -3},
            "max-prompt-tokens, max-new-tokens, chunk-tokens and block-tokens must be at least 1",
        ),
        ({"--max-new-tokens": 0}, "max-new-tokens, chunk-tokens and block-tokens must be at least 1"),
        ({"--chunk-tokens": 0}, "max-new-tokens, chunk-tokens and block-tokens must be at least 1"),
        ({"--sample": True, "--temperature": 0}, "temperature must be positive, got 0.0: without --sample the likel"),
        ({"--temperature": 0.5}, "temperature is of the draw: add --sample, or leave it out"),
        ({"--block-tokens": 0}, "max-new-tokens, chunk-tokens and block-tokens must be at least 1"),
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
    ended = run("generate", "--model", folder, "--prompt", QUESTION, "--nproc", 2, "--block-tokens", 19)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(
        "tree-attention: nproc must be at most the prompt's blocks, got 2 ranks for 19 tokens in blocks of 19: start"
    )


def test_more_tokens_than_positions():
    check_positions(LlamaConfig(**SMALL), POSITIONS - 128, 128)
    with pytest.raises(InputError, match="has 20000 positions, and 19873 prompt tokens with 128 new ones do not fit"):
        check_positions(LlamaConfig(**SMALL), POSITIONS - 127, 128)


def test_compiling_is_for_gpus():
    assert step_of(False, torch.device("cpu")) == "captured"
    with pytest.raises(InputError, match="compile is for GPUs, where steps are captured: leave it out"):
        step_of(True, torch.device("cpu"))


def test_a_document_is_cut_to_the_limit(folder):
    """What --max-prompt-tokens leaves: the beginning of the document, all of the question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for limit in (22, 23, 60, 100):
        ids = prompt_ids(tokenizer, "0123456789" * 50, QUESTION, plain=False, limit=limit)
        assert ids.shape == (1, limit)
        assert tokenizer.decode(ids[0]) == ("0123456789" * 10)[: limit - 21] + "\n\n" + QUESTION
    with pytest.raises(InputError, match="max-prompt-tokens must be more than the 19 of the prompt alone, got 18"):
        prompt_ids(tokenizer, "0123456789", QUESTION, plain=False, limit=18)


@pytest.fixture
def started(folder, document):
    """Two ranks in the middle of writing 18,000 tokens; in a process group of their own."""
    arguments = [
        COMMAND, "generate", "--model", folder, "--file", document, "--prompt", QUESTION, "--nproc", "2", "--sample",
        "--max-new-tokens", "18000",
    ]  # fmt: skip
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True
    ) as parent:
        try:
            assert select.select([parent.stdout], [], [], 90)[0]
            assert parent.stdout.read(1), parent.stderr.read().decode()  # the first words
            yield parent
        finally:
            if alive_in(parent.pid):
                os.killpg(parent.pid, signal.SIGKILL)


def alive_in(session):
    """pid -> command line of the processes in a session that have not ended."""
    alive = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                alive[int(process.name)] = (process / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since the listing
    return dict(sorted(alive.items()))


def wait_for_all(session, timeout_s):
    deadline = time.monotonic() + timeout_s
    while alive_in(session):
        assert time.monotonic() < deadline, alive_in(session)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(started):
    ranks = [pid for pid, line in alive_in(started.pid).items() if "spawn_main" in line]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 1
    assert err.decode().endswith("tree-attention: rank 1 was killed by SIGKILL; the others were ended\n")
    assert b"Traceback" not in err
    wait_for_all(started.pid, 5)


@pytest.mark.slow
def test_ranks_end_when_their_parent_is_killed(started):
    os.kill(started.pid, signal.SIGKILL)
    wait_for_all(started.pid, 15)


def interrupted(device):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_may_reach_a_rank_first():
    with pytest.raises(KeyboardInterrupt):
        run_on_ranks(interrupted, 1, "cpu")


def mistaken(device):
    if dist.get_rank() == 1:
        raise InputError("this rank does not see the file")
    dist.barrier()


@pytest.mark.slow
def test_what_one_rank_alone_finds_wrong_is_said_too(capfd):
    assert run_on_ranks(mistaken, 2, "cpu") == 2
    assert "tree-attention: this rank does not see the file\n" in capfd.readouterr().err


def done_with_trouble_ahead(device):
    atexit.register(os.abort)  # as a thread of gloo's that finds no interpreter any more
    sys.stdout.write("done\n")


@pytest.mark.slow
def test_nothing_that_happens_after_its_work_makes_a_rank_fail(capfd):
    assert run_on_ranks(done_with_trouble_ahead, 1, "cpu") == 0
    assert capfd.readouterr().out == "done\n"


@pytest.mark.slow
def test_ctrl_c_ends_everything_at_once(started):
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=5)
    assert started.returncode == 130
    assert err.decode().endswith("tree-attention: stopped\n")
    assert b"Traceback" not in err
    wait_for_all(started.pid, 2)


def test_info_shows_its_sections(capfd, monkeypatch):
    code, out, _ = call(capfd, monkeypatch, "info")
    assert code == 0
    titles = [
        "versions", "devices", "links", "shape", "backends for it", "algorithms for it", "auto chooses",
    ]  # fmt: skip
    assert [line.strip() for line in out.splitlines() if line.strip() in titles] == titles
    assert torch.__version__.partition("+")[0] in out


@pytest.mark.parametrize(
    "options", [[], ["--nproc", 2, "--masked"], ["--nproc", 3, "--head-dim", 1000, "--dtype", "float64"]]
)
def test_info_as_json_gives_every_backend_a_reason(capfd, monkeypatch, options):
    code, out, _ = call(capfd, monkeypatch, "info", "--json", *options)
    assert code == 0
    known = json.loads(out)
    assert set(known["backends for it"]) == set(BACKENDS)
    assert all(reason.strip() for reason in known["backends for it"].values())
    assert set(known["algorithms for it"]) == set(ALGORITHMS)
    chosen = known["auto chooses"]
    assert known["backends for it"][chosen["backend"]] == "can run it"
    assert chosen["algorithm"].partition(";")[0] in ALGORITHMS
    assert known["shape"]["step"].endswith(", masked") == ("--masked" in options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--heads", 30, "--kv-heads", 8], "heads a multiple of kv-heads"),
        (["--nproc", 0], "sizes must be at least 1"),
        (["--keys", -1], "at least"),
        (["--dtype", "float31"], "dtype must be a torch dtype such as bfloat16, got 'float31'"),
        (["--dtype", "int8"], "must be float64, float32, bfloat16 or float16, got torch.int8"),
        (["--dtype", "nn"], "dtype must be a torch dtype such as bfloat16, got 'nn'"),
    ],
)
def test_info_of_an_impossible_shape(capfd, monkeypatch, options, text):
    code, out, err = call(capfd, monkeypatch, "info", *options)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"tree-attention: .*{text}.*\n", err)


@pytest.mark.slow
def test_bench_weighs_and_times_its_contestants(folder, tmp_path):
    output = tmp_path / "records.jsonl"
    ended = run(
        "bench", "generate", "--model", folder, "--contexts", "96,64", "--decode-tokens", 2, "--rounds", 1,
        "--output", output,
    )  # fmt: skip
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
        (["--contexts", "64;96"], "contexts must be numbers with commas between them, got '64;96'"),
        (["--contexts", "0"], "contexts, decode-tokens and rounds must be at least 1, nproc at least 2"),
        (["--nproc", 1], "contexts, decode-tokens and rounds must be at least 1, nproc at least 2"),
    ],
)
def test_mistakes_in_bench(capfd, monkeypatch, folder, options, text):
    code, out, err = call(capfd, monkeypatch, "bench", "generate", "--model", folder, *options)
    assert (code, out, err) == (2, "", f"tree-attention: {text}\n")
