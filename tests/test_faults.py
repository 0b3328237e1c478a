"""A rank is killed while a prompt is read and while a save is written: all end soon, and the save before is whole."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import COMMAND, TORCHRUN, alive_in, run, wait_for_all, write_model
from tree_attention.hf import Session

LAYERS = 40  # so that a save is many files
MOST_S = 20  # from a rank's death to the end of the command; 30 are promised
OURS = (COMMAND,), ("--nproc", "2")  # how two ranks are started
BY_TORCHRUN = (TORCHRUN, "--no-python", "--standalone", "--nproc-per-node", "2", COMMAND), ()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, LAYERS)
    return folder


@contextlib.contextmanager
def started(launcher, *arguments):
    """The command in a session of its own, its stdin open, its bars drawn."""
    command, options = launcher
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    words = [*map(str, (*command, *arguments, *options))]
    with subprocess.Popen(words, **pipes, start_new_session=True, env=os.environ | {"FORCE_COLOR": "1"}) as parent:
        try:
            yield parent
        finally:
            for pid in [*ranks_of(parent), *alive_in(parent.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def ranks_of(parent):
    """Process ids, in rank order."""
    children = Path(f"/proc/{parent.pid}/task").glob("*/children")
    pids = sorted(int(pid) for listing in children for pid in listing.read_text().split())
    return [pid for pid in pids if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


def kill_rank(parent, rank):
    """Whoever started it must notice, and end all: returns what the command says then."""
    ranks = ranks_of(parent)
    assert len(ranks) == 2
    os.kill(ranks[rank], signal.SIGKILL)
    _, err = parent.communicate(timeout=MOST_S)
    assert parent.returncode == 1
    wait_for_all(parent.pid, 5)
    assert not any(alive_in(pid) for pid in ranks)  # torchrun's, each a session of its own
    return err.decode()


def says_who(err, launcher, rank):
    if launcher is OURS:
        assert err.endswith(f"tree-attention: rank {rank} was killed by SIGKILL; the others were ended\n")
        assert "Traceback" not in err
    elif f"rank {rank} has ended without an error, it may have been killed" not in err:  # else a peer was faster
        # torchrun's report, which names the process that failed first
        assert re.search(rf"Root Cause.*\n(.*\n)*? *rank +: {rank} .*\n *exitcode +: -9 ", err), err


@pytest.mark.parametrize(("launcher", "rank"), [(OURS, 1), (BY_TORCHRUN, 1)], ids=["ours", "torchrun"])
def test_while_a_prompt_is_read(folder, tmp_path, launcher, rank):
    document = tmp_path / "document.txt"
    document.write_text("All work and no play. " * 5000)
    arguments = ["--model", folder, "--file", document, "--prompt", "Who?", "--extrapolate", "--chunk-tokens", 32]
    with started(launcher, "generate", *arguments) as parent:
        read = b""
        while not re.search(rb"[1-9]\d*/\d+", read):  # the bar has moved
            more = os.read(parent.stderr.fileno(), 4096)
            assert more, read
            read += more
        says_who(kill_rank(parent, rank), launcher, rank)


def answer_of(session):
    return "".join(session.ask("Who?", max_new_tokens=8, do_sample=False))


@pytest.fixture(scope="module")
def model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tree_attention")
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved(folder, model, tmp_path_factory):
    """What two ranks saved, and the answer of who goes on from it."""
    save, document = tmp_path_factory.mktemp("saved") / "save", folder / "document.txt"
    document.write_text("All work and no play. " * 40)
    begun = run("chat", "--model", folder, "--file", document, "--save", save, "--nproc", 2)
    assert begun.returncode == 0, begun.stderr
    return save, answer_of(Session.load(save, *model))


def files_in(folder):
    """Also while others create and delete folders in it."""
    return {Path(parent, file) for parent, _, files in os.walk(folder) for file in files}


def test_while_a_save_is_written(folder, model, saved, tmp_path):
    before, answer = saved
    save = tmp_path / "save"
    shutil.copytree(before, save)
    manifest, old = (save / "current.json").read_bytes(), files_in(save)
    with started(OURS, "chat", "--model", folder, "--load", save, "--save", save) as parent:  # saves at once
        deadline = time.monotonic() + 90
        while not any("-rank-0." in file.name for file in files_in(save) - old):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        says_who(kill_rank(parent, 0), OURS, 0)
    assert (save / "current.json").read_bytes() == manifest, "the save was complete before its rank was killed"
    session = Session.load(save, *model)
    session.save(save)
    assert len([path for path in save.iterdir() if path.is_dir()]) == 1  # what the dead save had left is gone
    assert answer_of(session) == answer == answer_of(Session.load(save, *model))
