"""How the command starts and ends its ranks: a rank that dies, Ctrl-C, a closed stdout."""

import atexit
import os
import select
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

import tree_attention
from command import COMMAND, QUESTION, alive_in, run, wait_for_all
from tree_attention import InputError
from tree_attention.cli.launch import run_on_ranks
from tree_attention.cli.terminal import say


def test_to_say_something_to_nobody_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        say("What?")
        say("Who?")


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


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(started):
    ranks = sorted(pid for pid in alive_in(started.pid) if pid != started.pid)
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


def test_the_package_runs_as_the_command():
    ended = run("--version", command=(sys.executable, "-m", "tree_attention"))
    assert (ended.returncode, ended.stdout) == (0, f"tree-attention {tree_attention.__version__}\n"), ended.stderr
    assert run("no-such-command", command=(sys.executable, "-m", "tree_attention")).returncode == 2
