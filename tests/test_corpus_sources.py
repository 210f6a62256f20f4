"""Walking and reading: what is a repository, what is read, and the reason for every skipped file."""

import errno
import os

import pytest
from corpus_cases import write

from megacoder.core.errors import CorpusError
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.inputs import find_inputs
from megacoder.corpus.reading import Selection
from megacoder.corpus.sources import Repository, machine_repositories, walk


def read(root, **options):
    """({path: text} of the documents, {path: reason} of the drops)"""
    repository = root if isinstance(root, Repository) else Repository(name="r", root=root)
    items = list(repository.read(Selection(**({"max_file_bytes": 1000} | options))))
    documents = {item.path: item.text for item in items if isinstance(item, Document)}
    assert list(documents) == sorted(documents)
    return documents, {item.path: item.reason for item in items if isinstance(item, Dropped)}


def test_every_file_is_a_document_or_has_a_reason(tmp_path):
    root = tmp_path / "repo"
    write(root / "a.py")
    write(root / "bom.py", b"\xef\xbb\xbfx = 1\n")
    write(root / "binary.py", b"x\0y")
    write(root / "latin.py", "é".encode("latin-1"))
    write(root / "big.py", "x" * 1001)
    write(root / "edge.py", "x" * 1000)
    write(root / "notes.txt")
    write(root / "line\nbreak.py")
    write(root / ".git/config.py")
    write(root / "__pycache__/a.py")
    write(tmp_path / "outside.py")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "inner.py").symlink_to(root / "a.py")
    (root / "loop").symlink_to(root)
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    os.mkfifo(root / "pipe.py")
    with open(os.fsencode(root) + b"/\xff.py", "wb"):
        pass
    documents, drops = read(root)
    assert documents == {"a.py": "x = 1\n", "bom.py": "x = 1\n", "edge.py": "x" * 1000}
    assert drops == {
        "binary.py": "binary", "latin.py": "encoding unknown", "big.py": "over 1000 bytes",
        "notes.txt": "language unknown",
        "line\nbreak.py": "name not printable", "\\udcff.py": "name not printable", "link.py": "symbolic link",
        "inner.py": "symbolic link", "loop": "symbolic link", "dangling.py": "symbolic link",
        "pipe.py": "not a regular file",
    }  # fmt: skip


def test_a_link_instead_of_a_repository_is_not_followed(tmp_path):
    write(tmp_path / "elsewhere/a.py")
    (tmp_path / "repos").mkdir()
    (tmp_path / "repos/link").symlink_to(tmp_path / "elsewhere")
    (repository,) = find_inputs([tmp_path / "repos"]).sources
    assert read(repository) == ({}, {"link": "symbolic link"})


def test_unreadable_files_and_folders_have_a_reason(tmp_path, monkeypatch):
    write(tmp_path / "a.py")
    write(tmp_path / "secret.py")
    write(tmp_path / "closed/b.py")
    open_, scandir = os.open, os.scandir

    def refuse(real, name):
        def call(path, *args):
            if os.path.basename(os.fspath(path)) == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return real(path, *args)

        return call

    monkeypatch.setattr(os, "open", refuse(open_, "secret.py"))
    monkeypatch.setattr(os, "scandir", refuse(scandir, "closed"))
    documents, drops = read(tmp_path)
    assert list(documents) == ["a.py"]
    assert drops == {"secret.py": "unreadable: Permission denied", "closed/": "folder unreadable: Permission denied"}


def test_a_file_that_grows_past_the_limit_after_the_walk_is_not_read_fully(tmp_path, monkeypatch):
    write(tmp_path / "a.py", "x" * 2000)
    real = os.lstat
    shrunk = os.stat_result((*real(tmp_path / "a.py")[:6], 10, 0, 0, 0))
    monkeypatch.setattr(os, "lstat", lambda path: shrunk)
    assert read(tmp_path) == ({}, {"a.py": "over 1000 bytes"})


def test_only_selected_languages_are_read(tmp_path):
    write(tmp_path / "a.py")
    write(tmp_path / "b.c")
    documents, drops = read(tmp_path, languages=frozenset({"C"}))
    assert list(documents) == ["b.c"]
    assert drops == {"a.py": "language not selected"}


def test_a_large_repository_is_sampled_by_whole_folders(tmp_path):
    for folder in "abcdefgh":
        for name in ("x.py", "y.py"):
            write(tmp_path / folder / name, "x" * 100)
    documents, drops = read(tmp_path, max_repo_bytes=600)
    assert len(documents) == 6
    assert set(drops.values()) == {"over the limit for one repository"}
    assert all(f"{path[0]}/x.py" in documents and f"{path[0]}/y.py" in documents for path in documents)
    again, _ = read(tmp_path, max_repo_bytes=650)  # as many, since folders are whole
    other, _ = read(tmp_path, max_repo_bytes=650, seed=1)
    assert again == documents
    assert other != documents
    assert len(read(tmp_path, max_repo_bytes=1600)[0]) == 16


def test_a_folder_that_holds_sources_or_git_is_one_repository_and_any_other_holds_many(tmp_path):
    write(tmp_path / "many/one/a.py")
    write(tmp_path / "many/two/a.py")
    write(tmp_path / "many/index.json", "{}")
    write(tmp_path / "many/.cache/a.py")
    write(tmp_path / "single/a.py")
    write(tmp_path / "single/pkg/b.py")
    (tmp_path / "checkout/.git").mkdir(parents=True)
    write(tmp_path / "checkout/pkg/b.py")
    inputs = [tmp_path / "single", tmp_path / "many", tmp_path / "checkout"]
    found = find_inputs(inputs)
    assert [repository.name for repository in found.sources] == ["checkout", "one", "single", "two"]
    assert found == find_inputs([*reversed(inputs), tmp_path / "many"])


def test_equal_folder_names_are_told_apart_by_their_parents(tmp_path):
    write(tmp_path / "x/a/lib/f.py")
    write(tmp_path / "x/b/lib/f.py")
    write(tmp_path / "x/b/other/f.py")
    found = find_inputs([tmp_path / "x/b", tmp_path / "x/a"])
    assert [repository.name for repository in found.sources] == ["a/lib", "b/lib", "other"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: write(path / "notes.txt"), "neither source files nor sub-folders"),
    ],
)
def test_bad_inputs_are_named(tmp_path, make, says):
    make(tmp_path / "input")
    with pytest.raises(CorpusError, match=says) as caught:
        find_inputs([tmp_path / "input"])
    assert "\n" not in str(caught.value)


def test_the_excluded_folder_is_passed_over(tmp_path):
    write(tmp_path / "a.py")
    write(tmp_path / "out/b.py")
    repository = Repository(name="r", root=tmp_path)
    assert [entry.path for entry in walk(repository, exclude=tmp_path / "out")] == ["a.py"]


def test_the_fingerprint_follows_any_change(tmp_path):
    write(tmp_path / "a.py", "x = 1\n")

    def look():
        return Repository(name="r", root=tmp_path).inventory(
            Selection(languages=frozenset({"Python"}), max_file_bytes=1000)
        )

    before = look()
    assert before == look()
    assert before.size == 6
    write(tmp_path / "notes.txt")
    assert look().fingerprint != before.fingerprint
    assert look().size == 6


def test_the_machine_has_a_standard_library_without_its_tests():
    found = {repository.name: repository for repository in machine_repositories()}
    assert list(found) == sorted(found)
    assert {"python-stdlib", "numpy", "typing_extensions"} <= found.keys()
    selection = Selection(languages=frozenset({"Python"}))
    items = list(found["python-stdlib"].read(selection))
    kept = {item.path for item in items if isinstance(item, Document)}
    dropped = {item.path: item.reason for item in items if isinstance(item, Dropped)}
    assert {"typing.py", "asyncio/events.py"} <= kept
    assert not any(path.startswith(("test/", "site-packages/")) for path in kept)
    assert "test suite" in dropped.values()
    (single,) = (item for item in found["typing_extensions"].read(selection) if isinstance(item, Document))
    assert single.path == "typing_extensions.py"
    assert any(item.path == "numpy/__init__.py" for item in found["numpy"].read(selection))
