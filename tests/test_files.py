"""Atomic writes: full disks, crashes and interruptions keep the old content."""

import errno
import json

import pytest

from megacoder.core import files
from megacoder.core.errors import MegacoderError
from megacoder.core.files import exclusive, remove_stale_temporaries, replacing, replacing_dir, write_json, write_text


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


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    with exclusive(tmp_path, what="run"):
        holder = exclusive(tmp_path, what="run")
        with pytest.raises(MegacoderError, match="another run is working here"):
            holder.__enter__()
    with exclusive(tmp_path, what="run"):
        pass
