"""`tree-attention info`, `--help` and `--version` as a user runs them, with and without transformers."""

import json
import re
import subprocess
import sys

import pytest
import torch

import tree_attention
from command import call, run
from tree_attention.local import BACKENDS
from tree_attention.reduce import ALGORITHMS
from tree_attention.route import DECODE_ALGORITHMS


def test_info_shows_its_sections(capfd, monkeypatch):
    code, out, _ = call(capfd, monkeypatch, "info")
    assert code == 0
    titles = ["versions", "devices", "links", "shape", "backends", "algorithms", "routes"]
    assert [line.strip() for line in out.splitlines() if line.strip() in titles] == titles
    assert torch.__version__.partition("+")[0] in out


@pytest.mark.parametrize(
    "options", [[], ["--nproc", 2, "--masked"], ["--nproc", 3, "--head-dim", 1000, "--dtype", "float64"]]
)
def test_info_as_json_gives_every_backend_a_reason(capfd, monkeypatch, options):
    code, out, _ = call(capfd, monkeypatch, "info", "--json", *options)
    assert code == 0
    known = json.loads(out)
    assert set(known["backends"]) == set(BACKENDS)
    assert all(reason.strip() for reason in known["backends"].values())
    assert set(known["algorithms"]) == set(ALGORITHMS)
    for name, route in known["routes"].items():
        if isinstance(route, str):
            assert route.startswith("unavailable: "), name
            continue
        assert known["backends"][route["backend"]] == "available"
        assert route["algorithm"] in DECODE_ALGORITHMS
        assert route["received_bytes"] > 0
        assert route["backend"] not in route["backend_obstacles"]
        assert route["algorithm"] not in route["algorithm_obstacles"]
    assert isinstance(known["routes"]["process group"], dict)
    assert known["shape"]["step"].endswith(", masked") == ("--masked" in options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--heads", 30, "--kv-heads", 8], "heads a multiple of kv-heads"),
        (["--nproc", 0], "head-dim must be at least 1"),
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


WITHOUT_TRANSFORMERS = "import sys; sys.modules['transformers'] = None; from tree_attention.cli import main; main()"
EVERYWHERE = [
    ["--help"],
    ["-h"],
    ["generate", "--help"],
    ["info"],
    ["plan", "--model", "llama-3.1-8b", "--context", "1k", "--gpu", "h100"],
]


def without_transformers(*arguments):
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("arguments", EVERYWHERE, ids=" ".join)
def test_commands_that_run_without_transformers(arguments):
    ended = without_transformers(*arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "decode", "--keys", "0"], "tree-attention: keys, batch, heads, kv-heads and head-dim must be"),
        (
            ["calibrate", "--device", "cpu", "--nproc", "1"],
            "tree-attention: calibrate measures a link and needs at least 2",
        ),
    ],
)
def test_commands_that_only_refuse_their_options_without_transformers(arguments, text):
    ended = without_transformers(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["chat", "--model", "absent"],
        ["bench", "generate", "--model", "absent"],
        ["bench", "steps", "--config", "absent"],
        ["bench", "prefill", "--config", "absent"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_commands_that_need_transformers(arguments):
    """They say so before they look at any other option."""
    ended = without_transformers(*arguments)
    name = " ".join(word for word in arguments if not word.startswith("-") and word != "absent")
    needed = f"tree-attention {name} needs transformers: pip install 'tree-attention[hf]'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", needed)


def test_the_package_for_transformers_says_that_it_needs_them():
    code = "import sys; sys.modules['transformers'] = None; import tree_attention.hf"
    ended = run("-c", code, command=(sys.executable,))
    needed = "ImportError: tree_attention.hf needs transformers: pip install 'tree-attention[hf]'\n"
    assert ended.stderr.endswith(needed), ended.stderr


def test_the_version(capfd, monkeypatch):
    assert call(capfd, monkeypatch, "--version") == (0, f"tree-attention {tree_attention.__version__}\n", "")
