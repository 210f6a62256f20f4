"""Which files of a repository depend on which: a resolver per language family, and the edges they find together.

The paper extracts invocation relations by regular expressions from the languages it parses and treats files of every
other language one by one. To add a language, write a class with `languages`, `collect` and `dependencies` and add it
to `RESOLVERS`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from megacoder.corpus.imports.c import CIncludes
from megacoder.corpus.imports.csharp import CSharpUsings
from megacoder.corpus.imports.go import GoImports
from megacoder.corpus.imports.javascript import JavaScriptImports
from megacoder.corpus.imports.jvm import JvmImports
from megacoder.corpus.imports.php import PhpUses
from megacoder.corpus.imports.python import PythonImports
from megacoder.corpus.imports.ruby import RubyRequires
from megacoder.corpus.imports.rust import RustModules

__all__ = ["RESOLVERS", "Resolver", "linked_files", "repository_dependencies"]


class Resolver(Protocol):
    """Finds the dependencies between one repository's files of a language family."""

    languages: frozenset[str]

    def __init__(self, paths: Collection[str]) -> None:
        """`paths` are the family's files in the repository, those dropped by a stage included."""

    def collect(self, path: str, text: str) -> None:
        """Takes in one file, its lines ended by LF; called for every file before the first call of `dependencies`."""

    def dependencies(self, path: str) -> set[str]:
        """Those of the given paths that the file at `path` depends on; never `path` itself."""


RESOLVERS: tuple[type[Resolver], ...] = (
    PythonImports, CIncludes, JvmImports, JavaScriptImports, GoImports, RustModules, CSharpUsings, PhpUses,
    RubyRequires,
)  # fmt: skip


def repository_dependencies(languages: Mapping[str, str], files: Iterable[tuple[str, str]]) -> list[set[int]]:
    """For each of `files` the positions of the files that it depends on.

    `languages` maps every path of the repository to its language, so that an import of a dropped file is not resolved
    to a different one; `files` are (path, text), read once and in order.
    """
    family = {language: resolver for resolver in RESOLVERS for language in resolver.languages}
    members: dict[type[Resolver], list[str]] = {}
    for path, language in languages.items():
        if language in family:
            members.setdefault(family[language], []).append(path)
    resolvers = {kind: kind(paths) for kind, paths in members.items()}
    position: dict[str, int] = {}
    for path, text in files:
        position[path] = len(position)
        if languages[path] in family:
            lines = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
            resolvers[family[languages[path]]].collect(path, lines)
    edges: list[set[int]] = []
    for path in position:
        kind = family.get(languages[path])
        targets = resolvers[kind].dependencies(path) if kind is not None else set()
        edges.append({position[target] for target in targets if target in position})
    return edges


def linked_files(depends_on: Sequence[AbstractSet[int]]) -> set[int]:
    """The files that an edge leads from or to."""
    return {node for needs, targets in enumerate(depends_on) if targets for node in (needs, *targets)}
