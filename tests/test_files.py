"""Atomic writes: full disks, crashes and interruptions keep the old content."""

import errno
import fcntl
import json
import os
import shutil
import stat

import pytest

from megacoder.core import files
from megacoder.core.errors import MegacoderError
from megacoder.core.files import (
    LOCK,
    exclusive,
    remove_stale_temporaries,
    replacing,
    replacing_dir,
    write_json,
    write_text,
)


def names(folder):
    return sorted(child.name for child in folder.iterdir())


def test_a_write_replaces_the_entire_file(tmp_path):
    target = tmp_path / "deep" / "a.json"
    write_json(target, {"ü": 1})
    write_json(target, {"ü": 2})
    assert json.loads(target.read_text(encoding="utf-8")) == {"ü": 2}
    assert names(target.parent) == ["a.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def write_half():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failed_fsync_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync_path", full)
    with pytest.raises(OSError, match="No space"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_folders_are_replaced_completely_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with replacing_dir(target) as temporary:
        (temporary / "one").write_text("1")

    def write_half():
        with replacing_dir(target) as temporary:
            (temporary / "two").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert names(target) == ["one"]
    with replacing_dir(target) as temporary:
        (temporary / "three").write_text("3")
    assert names(target) == ["three"]
    assert names(tmp_path) == ["model"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / "a.json.tmp-123").write_text("half")
    (tmp_path / "model.tmp-9").mkdir()
    (tmp_path / "kept.json").write_text("{}")
    removed = remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == ["kept.json"]
    assert len(removed) == 2


def assert_locked(folder):
    holder = exclusive(folder, what="run")
    with pytest.raises(MegacoderError, match="another run is working here"):
        holder.__enter__()


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    with exclusive(tmp_path, what="run"):
        assert_locked(tmp_path)
    with exclusive(tmp_path, what="run"):
        pass
    assert names(tmp_path) == []


def test_a_lock_is_on_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    """Over NFS nothing else is locked for other hosts (man 2 flock)."""
    modes = []
    real = fcntl.flock

    def flock(descriptor, operation):
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path, what="run"):
        assert modes == [os.O_RDWR]


def test_what_a_killed_process_leaves_locks_nothing(tmp_path):
    (tmp_path / LOCK).touch()
    with exclusive(tmp_path, what="run"):
        assert_locked(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("next_holder", [False, True])
def test_a_lock_is_not_taken_on_a_file_that_its_holder_removes_meanwhile(tmp_path, monkeypatch, next_holder):
    real = fcntl.flock

    def flock(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", real)
        (tmp_path / LOCK).unlink()
        if next_holder:
            (tmp_path / LOCK).touch()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path, what="run"):
        assert_locked(tmp_path)


def test_a_folder_that_vanishes_and_comes_back_keeps_its_new_lock(tmp_path):
    with exclusive(tmp_path / "x", what="run"):
        shutil.rmtree(tmp_path / "x")
        other = exclusive(tmp_path / "x", what="run")
        other.__enter__()
    assert_locked(tmp_path / "x")
    other.__exit__(None, None, None)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_called_another_run(tmp_path, monkeypatch, error):
    def flock(descriptor, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    holder = exclusive(tmp_path, what="run")
    with pytest.raises(
        MegacoderError, match=f"cannot be locked: {os.strerror(error)}; choose a folder on a file system"
    ):
        holder.__enter__()


def test_a_folder_that_can_only_be_read_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # even where the tests run as root
    with exclusive(tmp_path, what="run"):
        assert names(tmp_path) == []
