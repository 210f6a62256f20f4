"""C#: `using` names a namespace, which any number of files declare; a file depends on those whose types it mentions."""

import posixpath
import re
from collections.abc import Collection

from megacoder.corpus.imports.lookup import Mentions, in_code, nearest_path

__all__ = ["CSharpUsings"]

_NAMESPACE = re.compile(r"^[ \t]*namespace[ \t]+([\w.]+)", re.MULTILINE)
_USING = re.compile(
    r"^[ \t]*(?:global[ \t]+)?using[ \t]+(?:static[ \t]+)?(?:\w+[ \t]*=[ \t]*)?(?:global::)?([\w.]+)[ \t]*"
    r"(?:<[^;\n]*>)?;",
    re.MULTILINE,
)
_TYPE = re.compile(
    r"^[ \t]*(?:\[[^\]\n]*\][ \t]*)?(?:(?:public|internal|private|protected|static|sealed|abstract|partial|readonly|ref"
    r"|unsafe|file|new)[ \t]+)*(?:class|struct|interface|enum|record(?:[ \t]+(?:class|struct))?"
    r"|delegate[ \t]+[\w.<>\[\]?]+)[ \t]+(\w+)",
    re.MULTILINE,
)


class CSharpUsings:
    """A `Resolver` for C#."""

    languages = frozenset({"C#"})

    def __init__(self, paths: Collection[str]) -> None:
        self._words = Mentions()
        self._namespaces: dict[str, dict[int, list[str]]] = {}  # namespace -> type, a word's number -> paths
        self._usings: dict[str, set[str]] = {}
        self._own: dict[str, list[str]] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file declares and uses."""
        self._own[path] = [found[1] for found in in_code(text, _NAMESPACE.finditer(text))]
        self._usings[path] = {found[1] for found in in_code(text, _USING.finditer(text))}
        if self._usings[path]:
            self._words.collect(path, text)
        types = {self._words.number(found[1]) for found in in_code(text, _TYPE.finditer(text))}
        for namespace in self._own[path]:
            declared = self._namespaces.setdefault(namespace, {})
            for type_ in types:
                declared.setdefault(type_, []).append(path)

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that declare the types that the file at `path` uses through its usings."""
        folder, found = posixpath.dirname(path), set()
        mentioned = self._words.of(path)
        for using in self._usings[path]:
            declared, types = self._used(using, self._own[path], mentioned)
            for type_ in types:
                found.add(nearest_path(declared[type_], folder) or path)
        return found - {path}

    def _used(self, using: str, own: list[str], mentioned: set[int]) -> tuple[dict[int, list[str]], Collection[int]]:
        """A namespace and those of its types that a file needs.

        `using A.B` names a namespace, possibly inside one of the file's own, or a type in a namespace.
        """
        for outer in ("", *(f"{namespace}." for namespace in own)):
            if (declared := self._namespaces.get(outer + using)) is not None:
                return declared, declared.keys() & mentioned
        namespace, _, name = using.rpartition(".")
        declared = self._namespaces.get(namespace, {})
        return declared, {self._words.number(name)} & declared.keys()
