"""What the tests of the command share: a small model in a folder, and how the command is run."""

import atexit
import functools
import json
import multiprocessing
import os
import runpy
import select
import signal
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
SERVER = """
import json, os, sys
import tree_attention.cli.generate, tree_attention.cli.models

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(request["files"]):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)
        sys.argv = request["argv"]
        tree_attention.cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(lines)
        server = _server()
        server.stdin.write(json.dumps({"argv": words, "files": [*map(str, files)]}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout_s)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise subprocess.TimeoutExpired(words, timeout_s, *(file.read_text() for file in files[1:]))
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files[1:]))


def run_as_ranks(file, *arguments, ranks=2, timeout_s=120):
    """A Python program on ranks, with torchrun's variables but in forks of a process that has loaded what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tree_attention.hf"])
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        outputs = [Path(folder, f"{name}-{rank}") for rank in range(ranks) for name in ("stdout", "stderr")]
        words = [str(file), *map(str, arguments)]
        processes = [
            context.Process(target=_as_rank, args=(rank, ranks, port, words, outputs[2 * rank : 2 * rank + 2]))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
            process.kill()
        said = [output.read_text() for output in outputs]
        assert [process.exitcode for process in processes] == [0] * ranks, said
        return "".join(said[::2])


def _as_rank(rank, ranks, port, words, outputs):
    for number, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, ranks, ranks, "127.0.0.1", port)), strict=True))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


@functools.cache
def _server():
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    server = subprocess.Popen([sys.executable, "-c", SERVER], **pipes, text=True, start_new_session=True)
    atexit.register(server.communicate)  # it ends where its stdin does
    return server


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
