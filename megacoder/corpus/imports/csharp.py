"""C#: `using` names a namespace, which any number of files declare; those count whose types the file mentions."""

import posixpath
import re
from collections.abc import Collection

from megacoder.corpus.imports.lookup import in_code, nearest_path

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
_WORD = re.compile(r"\w+")


class CSharpUsings:
    """A `Resolver` for C#."""

    languages = frozenset({"C#"})

    def __init__(self, paths: Collection[str]) -> None:
        self._namespaces: dict[str, dict[str, list[str]]] = {}  # namespace -> type -> paths
        self._usings: dict[str, set[str]] = {}
        self._own: dict[str, list[str]] = {}
        self._mentioned: dict[str, frozenset[str]] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file declares and uses."""
        self._own[path] = [found[1] for found in in_code(text, _NAMESPACE.finditer(text))]
        self._usings[path] = {found[1] for found in in_code(text, _USING.finditer(text))}
        if self._usings[path]:
            self._mentioned[path] = frozenset(_WORD.findall(text))
        types = {found[1] for found in in_code(text, _TYPE.finditer(text))}
        for namespace in self._own[path]:
            declared = self._namespaces.setdefault(namespace, {})
            for name in types:
                declared.setdefault(name, []).append(path)

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that declare what the file at `path` uses by its usings."""
        folder, found = posixpath.dirname(path), set()
        for using in self._usings[path]:
            namespace, types = self._namespace(using, self._own[path])
            if namespace is None:
                continue
            names = {types} if types else self._mentioned[path].intersection(self._namespaces[namespace])
            for name in names:
                found.add(nearest_path(self._namespaces[namespace].get(name, ()), folder) or path)
        return found - {path}

    def _namespace(self, using: str, own: list[str]) -> tuple[str | None, str]:
        """(namespace, type): `using A.B` is a namespace, also inside one of the file's own, or a type of one."""
        for outer in ("", *(f"{namespace}." for namespace in own)):
            if outer + using in self._namespaces:
                return outer + using, ""
        namespace, _, name = using.rpartition(".")
        return (namespace, name) if name in self._namespaces.get(namespace, ()) else (None, "")
