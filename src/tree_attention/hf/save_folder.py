"""The folder of a save: one process writes to it at a time, and nobody sees a half-written save.

    FOLDER/current.json     the manifest of the present save, with its SHA-256; replaced in one step of the file system
    FOLDER/lock             locked by the process that writes
    FOLDER/<name>/          the files of one save
    FOLDER/<name>/lock      locked by processes that read them, so that a writer does not delete them

The system releases the locks of a process that ends. A save contains the text: only its owner may read it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

VERSION = 2
CURRENT, LOCK = "current.json", "lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what some file systems say
NAME = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(r"layer-\d+(-rank-\d+)?(-tensor-\d+)?\.safetensors|lock")


@contextlib.contextmanager
def writing(folder: Path, name: str) -> Iterator[None]:
    """Create FOLDER/<name>, and keep other processes from writing to the folder.

    Raises OSError; BlockingIOError if another process is writing.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder / LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB):
        (folder / name).mkdir(mode=0o700)
        os.close(_open(folder / name / LOCK, os.O_WRONLY | os.O_CREAT))
        yield


def check_writing(folder: Path) -> None:
    """Raise InputError unless a save could be written to the folder now."""
    name = uuid.uuid4().hex
    try:
        with writing(folder, name):
            pass
        delete_save(folder / name)
    except BlockingIOError:
        raise InputError(f"another process is saving to {folder}: wait, or save to another folder") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from None


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the manifest of the folder's save, whose files no writer deletes meanwhile. Errors: as `read_manifest`."""
    while True:
        manifest = read_manifest(folder)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # an older save has no lock file, and some file systems have no locks
                held.enter_context(_locked(folder / manifest["name"] / LOCK, os.O_RDONLY, fcntl.LOCK_SH))
            if read_manifest(folder)["name"] == manifest["name"]:
                yield manifest
                return


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the folder's save. Raises InputError if there is none, or one that was changed."""
    try:
        document = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
        manifest, digest = document["manifest"], document["sha256"]
    except FileNotFoundError:
        raise InputError(f"{folder} holds no save: there is no {CURRENT}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the save in {folder} cannot be read: {CURRENT} is damaged ({error})") from None
    if digest != _digest(_as_json(manifest)):
        raise InputError(f"the save in {folder} cannot be read: {CURRENT} was changed since it was written")
    if manifest["version"] != VERSION:
        raise InputError(f"the save in {folder} is of version {manifest['version']}, this library reads {VERSION}")
    return manifest


def replace_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Make a save, whose files are on the disk, the one that is read."""
    new = folder / f"{CURRENT}.new"
    manifest = {"version": VERSION} | manifest
    write_file(new, json.dumps({"manifest": manifest, "sha256": _digest(_as_json(manifest))}).encode())
    new.replace(folder / CURRENT)
    listing = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(listing)
    finally:
        os.close(listing)


def delete_save(path: Path) -> None:
    """Delete a save, unless a process is reading it, or its folder holds other files, too."""
    if _is_ours(path):
        with contextlib.suppress(OSError), _locked(path / LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(path, ignore_errors=True)


def write_file(file: Path, data: bytes) -> str:
    """Write a file to the disk, and return its SHA-256."""
    with open(file, "wb", opener=_open) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return _digest(data)


def read_file(file: Path, digest: str) -> bytes:
    """Return the bytes of a file. Raises InputError unless they have this SHA-256."""
    data = file.read_bytes()
    if _digest(data) != digest:
        raise InputError(f"{file} is cut off or was changed since it was written")
    return data


def _is_ours(folder: Path) -> bool:
    """Return True if a save created the folder and nobody has added anything to it since."""
    is_named_so = NAME.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
    return bool(is_named_so) and all(FILE.fullmatch(file.name) and file.is_file() for file in folder.iterdir())


@contextlib.contextmanager
def _locked(file: Path, flags: int, operation: int) -> Iterator[None]:
    opened = _open(file, flags)
    try:
        try:
            fcntl.flock(opened, operation)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        yield
    finally:
        os.close(opened)


def _open(file: str | Path, flags: int) -> int:
    return os.open(file, flags, 0o600)


def _as_json(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
