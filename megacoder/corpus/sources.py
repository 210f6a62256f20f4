"""Where files come from: folders of repositories, and what Python has installed on this machine.

A repository is a name and a root. Walking it opens no file; reading yields every file as a document or as a drop with
its reason. Nothing outside the root is ever read: a symbolic link is a reason,
not a way, which also rules out loops. Version control metadata and byte-code caches are no part of a repository.
"""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacoder.core.errors import CorpusError
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.languages import DATA_LANGUAGES, language_of

__all__ = [
    "Entry", "Inventory", "Repository", "find_repositories", "inventory", "machine_repositories", "read_repository",
    "walk",
]  # fmt: skip

_NOT_WALKED = frozenset({".git", ".hg", ".svn", "__pycache__"})
_MACHINE_SKIPS = {
    **dict.fromkeys(("test", "tests", "idle_test"), "test suite"),
    **dict.fromkeys(("_vendor", "_vendored", "vendored", "third_party"), "vendored copy"),
}
"""An interpreter's packages carry tests that outweigh the code, and copies of one another."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A tree of files that belong together."""

    name: str
    """unique within a corpus"""
    root: Path
    """a folder, or a single file"""
    prefix: str = ""
    """put before each path; an installed package keeps the name that others import it by"""
    skip_folders: Mapping[str, str] = field(default_factory=dict)
    """folder name -> the reason why files below such a folder are left out"""
    not_walked: frozenset[str] = _NOT_WALKED
    """names of folders that are not looked at and not counted"""

    def identity(self) -> list[Any]:
        """The fields as plain values, the same in every process."""
        return [self.name, str(self.root), self.prefix, sorted(self.skip_folders.items()), sorted(self.not_walked)]


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
    """A repository as its names, sizes and times show it."""

    size: int
    """bytes in files that would be read"""
    fingerprint: str
    """changes when any file below the root comes, goes or is written"""


def find_repositories(inputs: Sequence[Path]) -> list[Repository]:
    """The repositories in `inputs`, in name order.

    A folder that directly holds source files or `.git` is one repository; of any other folder, each sub-folder is.
    A repository is named by its folder, with as many parents as it takes to be unique. CorpusError for an input that
    is missing or holds no repository.
    """
    roots = sorted({root for folder in inputs for root in _roots(Path(os.path.realpath(folder)))})
    names = dict.fromkeys(roots, 1)
    while len(taken := _by_name(names)) < len(roots):
        for name, group in taken.items():
            if len(group) > 1:
                if all(names[root] >= len(root.parts) for root in group):
                    raise CorpusError(f"{len(group)} folders cannot be told apart by name ({name!r}); rename one")
                names.update({root: names[root] + 1 for root in group})
    return sorted((Repository(name=name, root=group[0]) for name, group in taken.items()), key=lambda found: found.name)


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
        not_walked=_NOT_WALKED | {"site-packages", "dist-packages"},
    )
    return [packages[name] for name in sorted(packages)]


def walk(repository: Repository, *, exclude: Path | None = None) -> Iterator[Entry]:
    """Every file below the root, in an order that only the names decide; the folder `exclude` is passed over."""
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


def inventory(
    repository: Repository, *, languages: Collection[str], max_file_bytes: int, exclude: Path | None = None
) -> Inventory:
    """Walks the repository without opening a file."""
    size, state = 0, hashlib.sha256()
    for entry in walk(repository, exclude=exclude):
        line = f"{entry.path}\0{entry.size}\0{entry.modified_ns}\0{entry.reason}\0"
        state.update(line.encode("utf-8", "surrogateescape"))
        language = language_of(entry.path)
        if entry.reason is None and _name_reason(entry, language, repository, languages, max_file_bytes) is None:
            size += entry.size
    return Inventory(size=size, fingerprint=state.hexdigest())


def read_repository(
    repository: Repository,
    *,
    languages: Collection[str],
    max_file_bytes: int,
    max_repo_bytes: int | None = None,
    exclude: Path | None = None,
    seed: int = 0,
) -> Iterator[Document | Dropped]:
    """Every file of the repository, as a document or with the reason why it is none; documents in path order.

    Only files in one of `languages` and of at most `max_file_bytes` are opened. Where those hold more than
    `max_repo_bytes` together, whole folders are taken in an order keyed by `seed` until the limit is reached.
    """
    kept: list[tuple[Entry, str]] = []
    for entry in walk(repository, exclude=exclude):
        path = repository.prefix + entry.path
        language = language_of(path)
        reason = entry.reason or _name_reason(entry, language, repository, languages, max_file_bytes)
        if reason is None and language is not None:
            kept.append((entry, language))
        else:
            yield _drop(repository, path, language, entry.size, reason or "language unknown")
    kept.sort(key=lambda item: item[0].path)
    within = _within_cap([entry for entry, _ in kept], max_repo_bytes, f"{seed}:{repository.name}")
    for entry, language in kept:
        if entry.path in within:
            yield _read(repository, entry, language, max_file_bytes)
        else:
            path = repository.prefix + entry.path
            yield _drop(repository, path, language, entry.size, "over the limit for one repository")


def _roots(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise CorpusError(f"input {str(folder)!r}: no such folder") from None
    except NotADirectoryError:
        raise CorpusError(f"input {str(folder)!r} is a file; give the folder that holds the repositories") from None
    except OSError as error:
        raise CorpusError(f"input {str(folder)!r}: {error.strerror}") from None
    if any(entry.name == ".git" or _is_source(entry) for entry in entries):
        return [folder]
    roots = [folder / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not roots:
        what = "holds neither source files nor sub-folders" if entries else "is empty"
        raise CorpusError(f"input {str(folder)!r} {what}; give a repository, or a folder of repositories")
    return roots


def _is_source(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False) and language_of(entry.name) not in {None, *DATA_LANGUAGES}


def _by_name(parts: Mapping[Path, int]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for root, count in parts.items():
        name = "/".join([part for part in root.parts if part != os.sep][-count:]) or "root"
        groups.setdefault(os.fsencode(name).decode("utf-8", "backslashreplace"), []).append(root)
    return groups


def _is_package(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir():
        return entry.name.isidentifier() and entry.name not in _NOT_WALKED
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


def _name_reason(
    entry: Entry, language: str | None, repository: Repository, languages: Collection[str], max_file_bytes: int
) -> str | None:
    """Why a file is not worth opening, from its name and size alone."""
    if language is None:
        return "language unknown"
    if language not in languages:
        return "language not selected"
    if not entry.path.isprintable():  # undecodable bytes, or a line break that would end a path comment
        return "name not printable"
    for folder in entry.path.split("/")[:-1]:
        if folder in repository.skip_folders:
            return repository.skip_folders[folder]
    return f"over {max_file_bytes} bytes" if entry.size > max_file_bytes else None


def _within_cap(entries: Sequence[Entry], max_bytes: int | None, key: str) -> set[str]:
    """Paths of the files that fit; files of one folder go together since they depend on one another most."""
    if max_bytes is None or sum(entry.size for entry in entries) <= max_bytes:
        return {entry.path for entry in entries}
    taken, left = set(), max_bytes
    for entry in sorted(entries, key=lambda entry: (_digest(f"{key}:{os.path.dirname(entry.path)}"), entry.path)):
        if entry.size <= left:
            taken.add(entry.path)
            left -= entry.size
    return taken


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read(repository: Repository, entry: Entry, language: str, max_file_bytes: int) -> Document | Dropped:
    path = repository.prefix + entry.path
    location = repository.root / entry.path if repository.root.is_dir() else repository.root
    try:
        # neither a link nor a pipe that took the file's place since the walk may be followed or waited for
        descriptor = os.open(location, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            data = file.read(max_file_bytes + 1)
    except OSError as error:
        return _drop(repository, path, language, entry.size, f"unreadable: {error.strerror}")
    reason = None
    if len(data) > max_file_bytes:
        reason = f"over {max_file_bytes} bytes"
    elif b"\0" in data:
        reason = "binary"
    else:
        try:
            text = data.decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            reason = "not UTF-8"
    if reason is not None:
        return _drop(repository, path, language, len(data), reason)
    return Document(repo=repository.name, path=path, language=language, text=text, size=len(data))


def _drop(repository: Repository, path: str, language: str | None, size: int, reason: str) -> Dropped:
    printable = path.encode("utf-8", "backslashreplace").decode()
    return Dropped(repo=repository.name, path=printable, language=language, size=size, stage="read", reason=reason)
