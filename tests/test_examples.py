"""The examples run as their first lines say, and say what is right."""

import subprocess
import sys
from pathlib import Path

import pytest

from smollm2 import fetch, long_text

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2"]
LIMIT_S = 180


def run(*command):
    """Lines of stdout, without torchrun's rank prefixes."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_energy():
    lines = run(sys.executable, EXAMPLES / "energy.py")
    assert len(lines) == 3
    assert all("at most" in line for line in lines)


@pytest.mark.slow
def test_decode():
    lines = sorted(run(*TORCHRUN, EXAMPLES / "decode.py", 1000))
    assert lines[0].startswith("rank 0 of 2: 504 of 1000 keys, largest difference")
    assert lines[1].startswith("rank 1 of 2: 496 of 1000 keys, largest difference")


@pytest.mark.model
def test_generate(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(long_text()[:2000] + "\n\nThe capital of France is", encoding="utf-8")
    answer, *_, figures = run(*TORCHRUN, EXAMPLES / "generate.py", fetch(), file, 4)
    assert answer.startswith(" Paris")
    assert "tokens read" in figures
