"""What the tests of the command share: a small model in a folder, and how the command is run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tree_attention.cli

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


def run(*arguments, command=(COMMAND,), timeout_s=120, lines=""):
    arguments = [*command, *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout_s, check=False, input=lines)


def last_json(ended):
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def call(capfd, monkeypatch, *arguments):
    """The console script's function in this process, which saves loading torch: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["tree-attention", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        tree_attention.cli.main()
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
