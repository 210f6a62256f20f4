"""Which files of a repository depend on which: a resolver per language family, and the edges they find together.

The paper takes invocation relations by regular expressions from the languages it parses and treats files of every
other language one by one. A new language is a class with `languages` and `dependencies` and a line in `RESOLVERS`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from megacoder.corpus.c_includes import CIncludes
from megacoder.corpus.python_imports import PythonImports

__all__ = ["RESOLVERS", "Resolver", "repository_dependencies"]


class Resolver(Protocol):
    """Finds the dependencies between one repository's files of a language family."""

    languages: frozenset[str]

    def __init__(self, paths: Collection[str]) -> None:
        """`paths` are the family's files in the repository, those dropped by a stage included."""

    def dependencies(self, path: str, text: str) -> set[str]:
        """Paths, out of those given, that the file at `path` depends on; never `path` itself."""


RESOLVERS: tuple[type[Resolver], ...] = (PythonImports, CIncludes)


def repository_dependencies(languages: Mapping[str, str], files: Iterable[tuple[str, str]]) -> list[set[int]]:
    """For each of `files` the positions of the files that it depends on.

    `languages` maps every path of the repository to its language, so that an import of a file that was dropped is not
    taken for another one; `files` are (path, text), read once and in order.
    """
    family = {language: resolver for resolver in RESOLVERS for language in resolver.languages}
    members: dict[type[Resolver], list[str]] = {resolver: [] for resolver in RESOLVERS}
    for path, language in languages.items():
        if language in family:
            members[family[language]].append(path)
    resolvers = {resolver: resolver(paths) for resolver, paths in members.items() if paths}
    position: dict[str, int] = {}
    targets: list[set[str]] = []
    for path, text in files:
        position[path] = len(position)
        resolver = family.get(languages[path])
        targets.append(resolvers[resolver].dependencies(path, text) if resolver else set())
    return [{position[path] for path in paths if path in position} for paths in targets]
