"""What the tests of the command share: a small model in a folder, and how the command is run."""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tree_attention.cli.app import app

COMMAND = Path(sys.executable).with_name("tree-attention")
TORCHRUN = Path(sys.executable).with_name("torchrun")
POSITIONS = 20_000
LAYERS, H, H_KV, D = 2, 4, 2, 16
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": H,
    "num_key_value_heads": H_KV, "max_position_embeddings": POSITIONS, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QUESTION = "What is this about?"
PRELOAD = ("tree_attention.hf", "tree_attention.testing", "tree_attention.cli.generate", "tree_attention.cli.models")


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


def run(*arguments, command=None, timeout_s=120, lines=""):
    """Run the console script, or `command`. The script runs in a fork of a process that has loaded what it needs."""
    if command is not None:
        words = [*command, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False, input=lines)
    words = [str(COMMAND), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        stdin, stdout, stderr = files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        stdin.write_text(lines)
        process = _forked(words, files, {})
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout_s, stdout.read_text(), stderr.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, stdout.read_text(), stderr.read_text())


def run_as_ranks(file, *arguments, ranks=2, timeout_s=120, lines=""):
    """A Python program on ranks, with torchrun's variables but in forks of a process that has loaded what it needs.

    Returns what the ranks wrote to stdout, in rank order. lines: stdin of each rank.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        Path(folder, "stdin").write_text(lines)
        outputs = [Path(folder, f"{name}-{rank}") for rank in range(ranks) for name in ("stdout", "stderr")]
        words = [str(file), *map(str, arguments)]
        processes = []
        for rank in range(ranks):
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            variables = dict(zip(names, map(str, (rank, rank, ranks, ranks, "127.0.0.1", port)), strict=True))
            files = [Path(folder, "stdin"), *outputs[2 * rank : 2 * rank + 2]]
            processes.append(
                _forked(words, files, variables | {"TORCHELASTIC_RUN_ID": "a test", "OMP_NUM_THREADS": "1"})
            )
        for process in processes:
            process.join(timeout_s)
            process.kill()
        said = [output.read_text() for output in outputs]
        assert [process.exitcode for process in processes] == [0] * ranks, said
        return "".join(said[::2])


def _forked(words, files, variables):
    """Start a script in a fork of a process that has loaded what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    process = context.Process(target=_run_script, args=(words, files, variables))
    process.start()
    return process


def _run_script(words, files, variables):
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0)  # noqa: SIM115
    os.environ |= variables
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def last_json(ended):
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def call(capfd, monkeypatch, *arguments):
    """The command in this process, which saves loading torch: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["tree-attention", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        app()
    return end.value.code, *capfd.readouterr()


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
