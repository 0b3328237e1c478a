"""Several processes with one folder: one writes at a time, readers see whole saves, and only the owner may read."""

import multiprocessing
import os
import stat
import time

import pytest
import torch

from architectures import tiny
from command import PRELOAD
from test_session import contents, tokenizer
from tree_attention import TreeAttentionError
from tree_attention.hf import Session, save_folder

TEXTS = ("All work and no play. " * 4, "Once upon a time there was a cache. " * 3)
SECONDS = float(os.environ.get("SAVE_FOLDER_SECONDS", "5"))


def session_of(text):
    session = Session.open(tiny("llama", "tree_attention", 2), tokenizer())
    session.read(text)
    return session


def write(folder, number, ready, queue):
    """Save again and again; return how many saves were written, and what was said when another process saved."""
    torch.set_num_threads(1)
    session, saved, refused = session_of(TEXTS[number]), 0, set()
    ready.wait()
    stop = time.monotonic() + SECONDS
    while time.monotonic() < stop or not saved:
        try:
            session.save(folder)
            saved += 1
        except TreeAttentionError as error:
            refused.add(str(error))
    queue.put((saved, refused))


def read(folder, ready, queue):
    """Load again and again; return the texts found whose keys are right."""
    torch.set_num_threads(1)
    sessions = {session.tokens.shape[1]: session for session in map(session_of, TEXTS)}
    found = []
    ready.wait()
    stop = time.monotonic() + SECONDS
    while time.monotonic() < stop or not found:
        loaded = Session.load(folder, sessions[min(sessions)].model, tokenizer())
        right = sessions[loaded.tokens.shape[1]]
        assert torch.equal(loaded.tokens, right.tokens)
        for (_, keys), (_, right_keys) in zip(contents(loaded), contents(right), strict=True):
            assert torch.equal(keys, right_keys)
        found.append(loaded.tokens.shape[1])
    queue.put((len(found), set(found)))


@pytest.mark.slow
def test_two_writers_and_two_readers(tmp_path):
    """SAVE_FOLDER_SECONDS=60 makes it last a minute, counted from when all four are ready."""
    session_of(TEXTS[0]).save(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    queue, ready = context.Queue(), context.Barrier(4)
    works = [(write, (tmp_path, 0)), (write, (tmp_path, 1)), (read, (tmp_path,)), (read, (tmp_path,))]
    processes = [context.Process(target=work, args=(*given, ready, queue)) for work, given in works]
    for process in processes:
        process.start()
    ended = [queue.get(timeout=SECONDS + 60) for _ in processes]
    for process in processes:
        process.join()
    assert all(count for count, _ in ended)
    said = set().union(*(texts for _, texts in ended if not texts & {len(text) for text in TEXTS}))
    assert said <= {
        f"not saved, rank 0 cannot write to {tmp_path}: another process is saving there; a save that was there before "
        "is as it was"
    }
    assert [process.exitcode for process in processes] == [0] * 4
    session_of(TEXTS[0]).save(tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_who_saves_second_is_told(tmp_path):
    session = session_of(TEXTS[0])
    session.save(tmp_path)
    before = (tmp_path / save_folder.CURRENT).read_bytes()
    with (
        save_folder.writing(tmp_path, "f" * 32),
        pytest.raises(TreeAttentionError, match="another process is saving there; a save that was there before is as"),
    ):
        session.save(tmp_path)
    assert (tmp_path / save_folder.CURRENT).read_bytes() == before
    session.save(tmp_path)


def test_a_save_that_is_read_is_deleted_by_a_later_one(tmp_path):
    session = session_of(TEXTS[0])
    session.save(tmp_path)
    with save_folder.reading(tmp_path) as manifest:
        session.save(tmp_path)
        assert set(manifest["files"]) < {file.name for file in (tmp_path / manifest["name"]).iterdir()}
    session.save(tmp_path)
    assert not (tmp_path / manifest["name"]).exists()


def test_only_the_owner_may_read_a_save(tmp_path):
    umask = os.umask(0)
    try:
        session_of(TEXTS[0]).save(tmp_path / "parent" / "save")
    finally:
        os.umask(umask)
    made = [tmp_path / "parent" / "save", *(tmp_path / "parent" / "save").rglob("*")]
    assert len(made) == 1 + 3 + 1 + 2
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
