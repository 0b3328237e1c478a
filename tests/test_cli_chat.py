"""`tree-attention chat` as a user runs it: answers, saves, odd input, invalid options."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from unittest import mock

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import COMMAND, QUESTION, alive_in, call, run, run_as_ranks
from tree_attention.cli.chat import Terminal
from tree_attention.cli.terminal import read_lines
from tree_attention.hf import Session, save_folder


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
    again = "--load", tmp_path / "save", "--save", tmp_path / "save"
    ended = run_as_ranks(COMMAND, *arguments, *again, lines="When?\n", ranks=3)
    assert begun.stdout + ended == "".join(f"{answer}\n" for answer in answers)


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
    terminal = Terminal()
    with contextlib.suppress(OSError):
        terminal.send_lines()
    assert terminal.lines.recv() is None


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


@pytest.mark.slow
def test_questions_can_be_taken_back(folder, document, tmp_path):
    arguments = ["chat", "--model", folder, "--max-new-tokens", 9, "--nproc", 2, "--file", document]
    once = run(*arguments, lines="Who?\n")
    lines = "What?\n/rewind\nWhere?\nWhy?\n/new\n/rewind\n/what\n/save\nWho?\n/quit\nNobody is asked this.\n"
    again = run(*arguments, "--save", tmp_path / "save", lines=lines)
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith(once.stdout)
    told, _, saved = again.stderr.partition("/save ")
    assert told == "there is no question to take back\n"
    assert saved.endswith(f"Ctrl-C stops an answer.\nsaved to {tmp_path / 'save'}\n")
    alone = run("chat", "--model", folder, "--load", tmp_path / "save", "--max-new-tokens", 9, lines="/save\nHow?\n")
    assert alone.stdout == run(*arguments, lines="Who?\nHow?\n").stdout.removeprefix(once.stdout)


@contextlib.contextmanager
def chatting(folder, *arguments):
    """A chat in a process group of its own, as a terminal makes one, whose answers are long."""
    words = [COMMAND, "chat", "--model", folder, "--nproc", 2, "--sample", "--max-new-tokens", 15_000, *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*map(str, words)], **pipes, bufsize=0, start_new_session=True) as parent:
        try:
            yield parent
        finally:
            if alive_in(parent.pid):
                os.killpg(parent.pid, signal.SIGKILL)


def ask(parent):
    parent.stdin.write(QUESTION.encode() + b"\n")
    assert parent.stdout.read(1)  # of the answer


def saved_tokens(save, more_than=0):
    """Wait for a save of more tokens, which follows an answer; return their number."""
    deadline, tokens = time.monotonic() + 60, 0
    while tokens <= more_than:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):
            tokens = json.loads((save / "current.json").read_text())["manifest"]["tokens"]
    return tokens


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_then_the_chat(folder, tmp_path):
    save = tmp_path / "save"
    with chatting(folder, "--save", save) as parent:
        ask(parent)
        os.killpg(parent.pid, signal.SIGINT)
        first = saved_tokens(save)
        assert len(QUESTION) < first < 15_000
        while select.select([parent.stdout], [], [], 0.2)[0]:
            assert parent.stdout.read(1000)
        ask(parent)
        os.killpg(parent.pid, signal.SIGINT)
        second = saved_tokens(save, first)
        os.killpg(parent.pid, signal.SIGINT)
        parent.wait(30)  # before its stdin is closed, which would end it, too
        _, err = parent.communicate()
        assert (parent.returncode, err.decode()) == (128 + signal.SIGINT, f"saved to {save}\n")
        assert first + len(QUESTION) < second == saved_tokens(save) < first + 15_000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_told_to_end_saves(folder, tmp_path, number):
    with chatting(folder, "--save", tmp_path / "save") as parent:
        ask(parent)
        parent.send_signal(number)
        parent.wait(30)
        _, err = parent.communicate()
        assert (parent.returncode, err.decode()) == (128 + number, f"saved to {tmp_path / 'save'}\n")
        assert len(QUESTION) < saved_tokens(tmp_path / "save") < 15_000


def read_until(terminal, text):
    """What the command writes to the terminal until `text`, and that."""
    said, deadline = b"", time.monotonic() + 60
    while text not in said:
        assert time.monotonic() < deadline, said
        if select.select([terminal], [], [], 0.1)[0]:
            said += os.read(terminal, 4096)
    return said.decode()


@pytest.mark.slow
def test_a_person_at_a_terminal(folder, document):
    """Progress, a greeting, lines that can be edited and come back, and a terminal that is left as it was."""
    terminal, ours = pty.openpty()
    before = termios.tcgetattr(ours)
    words = [COMMAND, "chat", "--model", folder, "--nproc", 2, "--file", document, "--max-new-tokens", 9]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), ours)
    with subprocess.Popen([*map(str, words)], **streams, start_new_session=True) as chat:
        greeting = read_until(terminal, b"> ")
        for part in ("starting", "loading model", " GB", "reading", " tokens/s"):
            assert part in greeting
        assert re.search(
            rf"{folder.name} on 2 ranks \(cpu\), \d+ tokens, 0\.\d MB of keys and values per rank", greeting
        )
        os.write(terminal, b"Whot?\x02\x02\x7fa\n")  # two back, delete o, a
        read_until(terminal, b"> ")
        os.write(terminal, b"\x1b[A\n")  # the line before
        assert "What?" in read_until(terminal, b"> ")
        chat.send_signal(signal.SIGINT)
        assert chat.wait(30) == 128 + signal.SIGINT
    assert termios.tcgetattr(ours) == before
    os.close(terminal)
    os.close(ours)


def test_a_folder_that_cannot_be_saved_to_is_refused_before_the_model_is_loaded(capfd, monkeypatch, tmp_path, folder):
    (tmp_path / "file").touch()
    code, _, err = call(capfd, monkeypatch, "chat", "--model", folder, "--save", tmp_path / "file" / "save")
    assert (code, err) == (2, f"tree-attention: {tmp_path}/file/save cannot be written to: Not a directory\n")
    with save_folder.writing(tmp_path / "save", "f" * 32):
        code, _, err = call(capfd, monkeypatch, "chat", "--model", folder, "--save", tmp_path / "save")
    assert code == 2
    assert "another process is saving to" in err
