"""Writing files so that a reader never sees half of one.

What is written whole goes through `replacing` (or `replacing_dir`): the content is written to a temporary name beside
the target, flushed to the device, then renamed over it. A crash, a full disk or Ctrl-C leaves either the old file or
the new one, and the temporary is removed on every exit that Python still sees. Logs grow in place, by whole lines (see
`megacoder.train.metrics_log`), and checkpoints, which many ranks write, commit by a manifest of their own (see
`megacoder.checkpoint.commit`).
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megacoder.core.errors import MegacoderError

__all__ = [
    "LOCK",
    "exclusive",
    "fsync_path",
    "making_dir",
    "remove_stale_temporaries",
    "replacing",
    "replacing_dir",
    "why_not_writable",
    "write_json",
    "write_text",
]

LOCK = ".lock"
"""File that is in a folder while a process works in it (`exclusive`); no content."""

_SUFFIX = ".tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; on success it is fsynced and renamed to `path`, on any error removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{_SUFFIX}{os.getpid()}")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_dir(path: Path) -> Iterator[Path]:
    """Like `replacing` for a folder: files are fsynced, then the folder takes its name in one rename.

    An existing folder of that name is replaced only when the new one is complete; a crash between the two renames
    leaves neither under that name, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{_SUFFIX}{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for child in temporary.rglob("*"):
            fsync_path(child)
        fsync_path(temporary)
        if path.exists():  # a folder cannot be renamed over a non-empty one
            old = path.with_name(f"{path.name}{_SUFFIX}old-{os.getpid()}")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def making_dir(path: Path) -> Iterator[None]:
    """Makes the folder `path`; on any error in the block removes again what it made, unless that holds something."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Atomically replaces `path` with `text` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Atomically replaces `path` with `value` as indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def why_not_writable(path: Path) -> str | None:
    """Why `path` could not be written by the functions above, None if it could; tries it, and leaves nothing behind."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        if path.is_dir():
            return "it is a folder"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror}"


def remove_stale_temporaries(folder: Path) -> list[Path]:
    """Removes what a killed writer left directly in `folder`; returns what was removed.

    Only for a folder that this process owns: a live writer's temporary would go too.
    """
    stale = sorted(child for child in folder.glob(f"*{_SUFFIX}*")) if folder.is_dir() else []
    for child in stale:
        if child.is_dir():
            shutil.rmtree(child, ignore_errors=True)
        else:
            child.unlink(missing_ok=True)
    return stale


@contextmanager
def exclusive(folder: Path, *, what: str, instead: str = "another folder") -> Iterator[None]:
    """Locks `folder` for this process; MegacoderError, which advises to choose `instead`, if another has.

    The system unlocks it when a process dies. The lock is on a file in it, LOCK, opened for writing: hosts that share
    the folder over NFS know of no others. The file is removed at the end; a killed process leaves it, unlocked. Who may
    only read the folder locks nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        yield
        return
    descriptor = _lock(folder, what, instead)
    try:
        yield
    finally:
        if _is_file_of(descriptor, folder / LOCK):  # else the folder was removed, and perhaps made anew by another
            (folder / LOCK).unlink()
        os.close(descriptor)


def _lock(folder: Path, what: str, instead: str) -> int:
    """The descriptor of LOCK in `folder`, locked."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise MegacoderError(
                f"{folder}: another {what} is working here; wait for it, or choose {instead}"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise MegacoderError(
                f"{path}: cannot be locked: {error.strerror or error}; choose a folder on a file system with locks, or "
                "have it mounted with them (NFS: its lock service; Lustre: -o flock)"
            ) from None
        os.close(descriptor)  # its holder has removed it just now


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def fsync_path(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
