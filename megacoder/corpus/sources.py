"""Where files come from: folders of repositories, and what Python has installed on this machine.

A repository is a name and a root. Walking it opens no file; reading yields every file as a document or as a drop with
its reason. Nothing outside the root is ever read: a symbolic link is dropped, not followed, which also rules out loops.
Version control metadata and byte-code caches are not part of a repository.
"""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.licenses import LICENSE_BYTES, is_license_file, license_of
from megacoder.corpus.reading import (
    NOT_WALKED,
    Selection,
    decode,
    make_document,
    make_drop,
    name_reason,
    within_cap,
)

__all__ = ["Entry", "Inventory", "Repository", "Source", "machine_repositories", "walk"]

_MACHINE_SKIPS = {
    **dict.fromkeys(("test", "tests", "idle_test"), "test suite"),
    **dict.fromkeys(("_vendor", "_vendored", "vendored", "third_party"), "vendored copy"),
}
"""An interpreter's packages carry tests that outweigh the code, and copies of one another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What a walk knows of a file, or of a folder that cannot be listed."""

    path: str
    """relative to the root, with `/`"""
    size: int
    """bytes"""
    modified_ns: int
    reason: str | None = None
    """why it cannot be read, if that shows without opening it"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """What the names, sizes and times of a repository's files tell."""

    size: int
    """bytes in files that would be read"""
    fingerprint: str
    """changes when any file below the root is added, removed or written"""


class Source(Protocol):
    """A repository, wherever its files are."""

    @property
    def name(self) -> str:
        """Unique within a corpus."""

    def identity(self) -> list[Any]:
        """Plain values that identify the repository."""

    def inventory(self, selection: Selection) -> Inventory:
        """What can be known without reading it."""

    def read(self, selection: Selection) -> Iterator[Document | Dropped]:
        """Every file, as a document or as a drop with its reason; documents in path order, no path twice."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A tree of files that belong together."""

    name: str
    """unique within a corpus"""
    root: Path
    """a folder, or a single file"""
    prefix: str = ""
    """put before each path, so that an installed package keeps the name by which others import it"""
    skip_folders: Mapping[str, str] = field(default_factory=dict)
    """folder name -> the reason why files below such a folder are dropped"""
    not_walked: frozenset[str] = NOT_WALKED
    """names of folders that are neither read nor counted"""

    def identity(self) -> list[Any]:
        """The fields as plain values, the same in every process."""
        return [self.name, str(self.root), self.prefix, sorted(self.skip_folders.items()), sorted(self.not_walked)]

    def inventory(self, selection: Selection) -> "Inventory":
        """Walks the repository without opening a file."""
        size, state = 0, hashlib.sha256()
        for entry in walk(self, exclude=selection.exclude):
            line = f"{entry.path}\0{entry.size}\0{entry.modified_ns}\0{entry.reason}\0"
            state.update(line.encode("utf-8", "surrogateescape"))
            if (entry.reason or name_reason(entry.path, entry.size, selection, self.skip_folders)) is None:
                size += entry.size
        if selection.max_repo_bytes is not None:
            size = min(size, selection.max_repo_bytes)
        return Inventory(size=size, fingerprint=state.hexdigest())

    def read(self, selection: Selection) -> Iterator[Document | Dropped]:
        """Every file, as a document or as a drop with its reason; documents in path order."""
        kept: list[Entry] = []
        licenses: list[tuple[str, str]] = []
        for entry in walk(self, exclude=selection.exclude):
            path = self.prefix + entry.path
            reason = entry.reason or name_reason(entry.path, entry.size, selection, self.skip_folders)
            if entry.reason is None and "/" not in entry.path and is_license_file(entry.path):
                licenses.append((entry.path, self._license_text(entry)))
            if reason is None:
                kept.append(entry)
            else:
                yield make_drop(self.name, path, entry.size, reason)
        license_ = license_of(licenses)
        kept.sort(key=lambda entry: entry.path)
        sizes = [(entry.path, entry.size) for entry in kept]
        within = within_cap(sizes, selection.max_repo_bytes, f"{selection.seed}:{self.name}")
        for entry in kept:
            if entry.path in within:
                yield self._read(entry, selection, license_)
            else:
                yield make_drop(self.name, self.prefix + entry.path, entry.size, "over the limit for one repository")

    @cached_property
    def _folder(self) -> str:
        """What every path in it begins with; nothing for a single file."""
        return f"{self.root}/" if self.root.is_dir() else ""

    def _read(self, entry: Entry, selection: Selection, license_: str) -> Document | Dropped:
        path = self.prefix + entry.path
        try:
            data = self._bytes(entry, selection.max_file_bytes + 1)
        except OSError as error:
            return make_drop(self.name, path, entry.size, f"unreadable: {error.strerror}")
        return make_document(self.name, path, data, selection, license=license_)

    def _license_text(self, entry: Entry) -> str:
        try:
            return decode(self._bytes(entry, LICENSE_BYTES), "latin-1")[0] or ""
        except OSError:
            return ""

    def _bytes(self, entry: Entry, limit: int) -> bytes:
        location = self._folder + entry.path if self._folder else self.root
        # neither follow a link nor wait for a pipe that replaced the file since the walk
        descriptor = os.open(location, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            return file.read(limit)


def machine_repositories() -> list[Repository]:
    """The standard library and each top-level installed package, without test suites and vendored copies."""
    paths = sysconfig.get_paths()
    packages = {
        entry.name.removesuffix(".py"): Repository(
            name=entry.name.removesuffix(".py"),
            root=Path(os.path.realpath(entry.path)),
            prefix="" if entry.is_file() else f"{entry.name}/",
            skip_folders=_MACHINE_SKIPS,
        )
        for site in sorted({paths["purelib"], paths["platlib"]})
        if os.path.isdir(site)
        for entry in os.scandir(site)
        if _is_package(entry)
    }
    packages["python-stdlib"] = Repository(
        name="python-stdlib",
        root=Path(os.path.realpath(paths["stdlib"])),
        skip_folders=_MACHINE_SKIPS,
        not_walked=NOT_WALKED | {"site-packages", "dist-packages"},
    )
    return [packages[name] for name in sorted(packages)]


def walk(repository: Repository, *, exclude: Path | None = None) -> Iterator[Entry]:
    """Every file below the root, in an order that only the names decide; the folder `exclude` is skipped."""
    root = os.fspath(repository.root)
    if not os.path.isdir(root) or os.path.islink(root):
        yield _entry(os.path.basename(root), root)
        return
    passed_over = None if exclude is None else os.path.realpath(exclude)
    pending = [(os.path.realpath(root), "")]
    while pending:
        folder, relative = pending.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield Entry(path=relative, size=0, modified_ns=0, reason=f"folder unreadable: {error.strerror}")
            continue
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield _entry(relative + entry.name, entry.path)
            elif entry.name not in repository.not_walked and entry.path != passed_over:
                pending.append((entry.path, f"{relative}{entry.name}/"))


def _is_package(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir():
        return entry.name.isidentifier() and entry.name not in NOT_WALKED
    return entry.name.endswith(".py") and entry.name.removesuffix(".py").isidentifier()


def _entry(path: str, location: str) -> Entry:
    try:
        status = os.lstat(location)
    except OSError as error:
        return Entry(path=path, size=0, modified_ns=0, reason=f"unreadable: {error.strerror}")
    if stat.S_ISREG(status.st_mode):
        return Entry(path=path, size=status.st_size, modified_ns=status.st_mtime_ns)
    reason = "symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
    return Entry(path=path, size=0, modified_ns=status.st_mtime_ns, reason=reason)
