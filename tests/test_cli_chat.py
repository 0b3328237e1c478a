"""`tree-attention chat` as a user runs it: answers, saves, odd input, invalid options."""

import contextlib
import io
import multiprocessing
import sys
from unittest import mock

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import COMMAND, TORCHRUN, call, run
from tree_attention.cli.chat import _send_lines
from tree_attention.cli.terminal import read_lines
from tree_attention.hf import Session


def opened(folder):
    """A session of this process alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tree_attention")
    return Session.open(model, AutoTokenizer.from_pretrained(folder))


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
    assert list(read_lines()) == ["What?\n", "\ufffd\ufffd\n", "Who?"]


@pytest.mark.parametrize("stdin", [None, mock.Mock(readline=mock.Mock(side_effect=OSError))], ids=["closed", "broken"])
def test_a_chat_ends_where_stdin_does(monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    lines, writer = multiprocessing.Pipe(duplex=False)
    with lines, writer:
        with contextlib.suppress(OSError):
            _send_lines(writer)
        assert lines.recv() is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--load", "{tmp}"], "{tmp} holds no save: there is no current.json"),
        (["--file", "{tmp}/absent.txt"], "file {tmp}/absent.txt cannot be read: No such file or directory"),
        (["--max-tokens", 0], "max-tokens must be at least 1, got 0"),
        (["--dtype", "int8"], "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        (["--nproc", 0], "nproc must be at least 1, got 0"),
    ],
)
def test_mistakes_in_chat(capfd, monkeypatch, tmp_path, folder, options, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    options = [str(option).replace("{tmp}", str(tmp_path)) for option in options]
    code, out, err = call(capfd, monkeypatch, "chat", "--model", folder, *options)
    assert (code, out, err) == (2, "", f"tree-attention: {text.replace('{tmp}', str(tmp_path))}\n")
