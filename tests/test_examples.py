"""The examples run as their first lines say, and say what is right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import run_as_ranks
from smollm2 import fetch, long_text

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2"]
LIMIT_S = 180


def run(*command):
    """Lines of stdout, without torchrun's rank prefixes."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_energy():
    lines = run(sys.executable, EXAMPLES / "energy.py")
    assert len(lines) == 3
    assert all("at most" in line for line in lines)


@pytest.mark.slow
def test_decode():
    lines = sorted(run(*TORCHRUN, EXAMPLES / "decode.py", 1000))
    assert lines[0].startswith("rank 0: 504 of 1000 keys, error ")
    assert lines[1].startswith("rank 1: 496 of 1000 keys, error ")


@pytest.mark.model
def test_generate(tmp_path):
    """What it writes is what transformers alone writes, in one process."""
    text, file = long_text()[:2000], tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    lines = run_as_ranks(EXAMPLES / "generate.py", fetch(), file, 8).splitlines()

    tokenizer = AutoTokenizer.from_pretrained(fetch())
    model = AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32)
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    read = inputs.input_ids.shape[1]
    assert "\n".join(lines[:-1]) == tokenizer.decode(out[0, read:], skip_special_tokens=True)
    assert lines[-1].startswith(f"({read} tokens read, ")
