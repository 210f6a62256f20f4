"""What `--input` may name: a repository, an archive of one, a table of files, or a folder that holds any of these.

A folder that directly holds source files or `.git` is one repository. In any other folder, each sub-folder and each
archive is a repository, except that a sub-folder with nothing but tables (Parquet, JSONL), at any depth, is read as
tables.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megacoder.core.errors import ConfigError, CorpusError
from megacoder.corpus.archives import Archive, archive_stem
from megacoder.corpus.languages import BESIDE_CODE, language_of
from megacoder.corpus.sources import Repository, Source
from megacoder.corpus.tables import is_table

__all__ = ["Inputs", "find_inputs"]

_BESIDE_TABLES = (".md", ".txt", ".json", ".yaml", ".yml", ".lock", ".crc")  # documentation of data sets


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the inputs hold, in an order that does not depend on the order of the inputs."""

    sources: tuple[Source, ...] = ()
    """folders and archives, by name"""
    tables: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        ordered = sorted(self.sources, key=lambda source: source.name)
        for before, after in pairwise(ordered):
            if before.name == after.name:
                places = f"{before.identity()[1]} and {after.identity()[1]}"
                raise ConfigError(f"two repositories are called {after.name!r}: {places}; rename one")


def find_inputs(inputs: Sequence[Path]) -> Inputs:
    """The repositories and tables in `inputs`.

    A repository is named by its folder or archive, with as many parents as it takes to be unique. CorpusError for an
    input that is missing or holds nothing.
    """
    found = sorted({path for given in inputs for path in _found_in(Path(os.path.realpath(given)))})
    tables = [path for path in found if path.is_file() and is_table(path.name)]
    roots = [path for path in found if path not in set(tables)]
    names = dict.fromkeys(roots, 1)
    while len(taken := _by_name(names)) < len(roots):
        for name, group in taken.items():
            if len(group) > 1:
                if all(names[root] >= len(root.parts) for root in group):
                    raise CorpusError(f"{len(group)} inputs cannot be told apart by name ({name!r}); rename one")
                names.update({root: names[root] + 1 for root in group})
    sources = [_source(name, group[0]) for name, group in sorted(taken.items())]
    return Inputs(sources=tuple(sources), tables=tuple(tables))


def _source(name: str, root: Path) -> Source:
    is_archive = archive_stem(root.name) is not None and root.is_file()
    return Archive(name=name, file=root) if is_archive else Repository(name=name, root=root)


def _found_in(given: Path) -> list[Path]:
    if given.is_file():
        if archive_stem(given.name) is None and not is_table(given.name):
            raise CorpusError(
                f"input {str(given)!r} is a file; give a folder, an archive (.zip, .tar, .tar.gz, ...) "
                "or a table (.parquet, .jsonl, .jsonl.gz, .jsonl.zst)"
            )
        return [given]
    try:
        with os.scandir(given) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise CorpusError(f"input {str(given)!r}: no such folder") from None
    except OSError as error:
        raise CorpusError(f"input {str(given)!r}: {error.strerror}") from None
    if any(entry.name == ".git" or _is_source(entry) for entry in entries):
        return [given]
    found: list[Path] = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _tables_in(given / entry.name) or [given / entry.name]
        elif entry.is_file(follow_symlinks=False) and (is_table(entry.name) or archive_stem(entry.name) is not None):
            found.append(given / entry.name)
    if not found:
        what = "holds neither source files nor sub-folders, archives or tables" if entries else "is empty"
        raise CorpusError(f"input {str(given)!r} {what}; give a repository, or a folder of repositories")
    return found


def _tables_in(folder: Path) -> list[Path]:
    """The tables below `folder` if it holds nothing else, else none: a repository may hold some as test data."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if is_table(name):
                found.append(Path(parent, name))
            elif not name.startswith(".") and not name.lower().endswith(_BESIDE_TABLES):
                return []
    return found


def _is_source(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False) and language_of(entry.name) not in {None, *BESIDE_CODE}


def _by_name(parts: Mapping[Path, int]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for root, count in parts.items():
        stem = archive_stem(root.name) if root.is_file() else None
        named = root if stem is None else root.with_name(stem)
        name = "/".join([part for part in named.parts if part != os.sep][-count:]) or "root"
        groups.setdefault(os.fsencode(name).decode("utf-8", "backslashreplace"), []).append(root)
    return groups
