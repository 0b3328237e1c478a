"""How the command starts and ends its ranks: a rank that dies, Ctrl-C, a closed stdout."""

import ast
import atexit
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tree_attention
from command import COMMAND, QUESTION, alive_in, run, wait_for_all
from tree_attention import InputError, host
from tree_attention.cli import launch
from tree_attention.cli.launch import run_on_ranks, set_threads
from tree_attention.cli.terminal import say, under_torchrun
from tree_attention.group import gather_values


def test_to_say_something_to_nobody_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        say("What?")
        say("Who?")


@pytest.fixture
def started(folder, document, tmp_path):
    """Two ranks in the middle of writing 18,000 tokens; in a process group of their own, their files in tmp_path."""
    arguments = [
        COMMAND, "generate", "--model", folder, "--file", document, "--prompt", QUESTION, "--nproc", "2", "--sample",
        "--max-new-tokens", "18000",
    ]  # fmt: skip
    pipes, environment = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE), os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(arguments, **pipes, bufsize=0, start_new_session=True, env=environment) as parent:
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
def test_sigterm_leaves_no_rank_and_no_file_behind(started, tmp_path):
    assert any(tmp_path.iterdir())
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=30)
    assert started.returncode == 128 + signal.SIGTERM
    wait_for_all(started.pid, 5)
    assert not any(tmp_path.iterdir())


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


def hung_up(device):
    for pid in (os.getppid(), os.getpid()):
        os.kill(pid, signal.SIGHUP)


def killed_parent(device):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.slow
def test_ranks_that_ignore_signals_end_with_their_parent():
    code = "from test_cli_launch import *; run_on_ranks(killed_parent, 2, 'cpu', on_signal=print)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, start_new_session=True) as parent:
        parent.wait(60)
        wait_for_all(parent.pid, 10)


@pytest.mark.slow
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_on_ranks(hung_up, 1, "cpu") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


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


def sockets(device):
    """Print the local addresses, in hexadecimal, of each rank's sockets that listen."""
    own = {os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                found.append(words[1].partition(":")[0])
    gathered = gather_values(found, dist.group.WORLD)
    if dist.get_rank() == 0:
        sys.stdout.write(f"{gathered}\n")


@pytest.mark.slow
def test_ranks_of_one_host_listen_on_the_loopback_interface_alone(capfd):
    assert run_on_ranks(sockets, 2, "cpu") == 0
    of_ranks = ast.literal_eval(capfd.readouterr().out)
    assert len(of_ranks) == 2
    for addresses in of_ranks:
        assert addresses
        assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
def test_files_of_the_current_folder_do_not_run_in_the_ranks(folder, tmp_path):
    for name in ("pickle", "json", "socket", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the current folder ran')")
    arguments = [COMMAND, "generate", "--model", folder, "--prompt", QUESTION, "--nproc", "2", "--max-new-tokens", "2"]
    ended = subprocess.run(arguments, capture_output=True, cwd=tmp_path, timeout=90)
    assert ended.returncode == 0, ended.stderr


def test_what_torchrun_left_behind_is_no_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left")
    assert not under_torchrun()


def test_more_ranks_than_this_machine_can_run_are_refused():
    with pytest.raises(InputError, match=r"nproc may be at most \d+, 8 per CPU that this process may use, got 9999"):
        run_on_ranks(sockets, 9999, "cpu")


def test_threads_are_those_that_this_process_may_use(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    set_threads(3)
    (tmp_path / "cpu.max").write_text("550000 100000\n")
    set_threads(3)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    set_threads(100)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    set_threads(3)
    assert given == [4, 2, 1]


def test_the_package_runs_as_the_command():
    ended = run("--version", command=(sys.executable, "-m", "tree_attention"))
    assert (ended.returncode, ended.stdout) == (0, f"tree-attention {tree_attention.__version__}\n"), ended.stderr
    assert run("no-such-command", command=(sys.executable, "-m", "tree_attention")).returncode == 2


def test_folders_of_killed_commands_are_deleted(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    ended, own = tmp_path / "tree-attention-99999999-a", tmp_path / f"tree-attention-{os.getpid()}-a"
    for folder in (ended, own):
        (folder / "inside").mkdir(parents=True)
    launch._delete_leftovers()
    assert [*tmp_path.iterdir()] == [own]


def test_free_memory_is_that_of_the_control_group(monkeypatch, tmp_path):
    assert host.free_bytes() > 1e6
    for name, text in {"max": "1000000", "current": "600000", "stat": "anon 500000\ninactive_file 50000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert host.free_bytes() == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host.free_bytes() > 1e6
