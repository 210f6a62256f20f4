"""Rust: `mod` declares a file as a child, `use` names an item by its path from the crate, the module or its parent.

A path resolves to its longest prefix that is a module with a file of its own; the rest are items in it.
"""

import posixpath
import re
from collections.abc import Collection, Iterator

from megacoder.corpus.imports.lookup import in_code

__all__ = ["RustModules", "rust_uses"]

_MOD = re.compile(
    r"(?:^[ \t]*#\[path[ \t]*=[ \t]*\"([^\"\n]+)\"\]\s*(?:#\[[^\]\n]*\]\s*)*)?"
    r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?mod[ \t]+(\w+)[ \t]*;",
    re.MULTILINE,
)
_USE = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?use[ \t]+([^;]+);", re.MULTILINE)
_PATH = re.compile(r"\bcrate::(\w+(?:::\w+)*)")
_ALIAS = re.compile(r"\s+as\s+\w+")
_CRATE_FILES = ("lib.rs", "main.rs")


def rust_uses(statement: str) -> Iterator[list[str]]:
    """The paths of one `use`, braces expanded: `a::{b, c::d}` -> [a, b], [a, c, d]."""
    text = _ALIAS.sub("", re.sub(r"//[^\n]*", "", statement))
    prefixes: list[list[str]] = [[]]
    word: list[str] = []
    for token in re.findall(r"\w+|\*|::|[{},]", text):
        if token == "{":
            prefixes.append(prefixes[-1] + word)
            word = []
        elif token in ",}":
            if word:
                yield prefixes[-1] + word
            word = []
            if token == "}" and len(prefixes) > 1:
                prefixes.pop()
        elif token != "::":
            word.append(token)
    if word:
        yield prefixes[0] + word


class RustModules:
    """A `Resolver` for Rust."""

    languages = frozenset({"Rust"})

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = frozenset(paths)
        self._roots = sorted({posixpath.dirname(p) for p in paths if posixpath.basename(p) in _CRATE_FILES}, key=len)
        self._crates: dict[str, str] = {}
        for root in self._roots:
            folder = posixpath.dirname(root) if posixpath.basename(root) == "src" else root
            self._crates.setdefault(posixpath.basename(folder).replace("-", "_"), root)
        self._children: dict[str, list[tuple[str, str]]] = {}
        self._uses: dict[str, set[tuple[str, ...]]] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in the modules that the file declares and the paths that it uses."""
        self._children[path] = [(found[1] or "", found[2]) for found in in_code(text, _MOD.finditer(text))]
        uses = {tuple(use) for found in in_code(text, _USE.finditer(text)) for use in rust_uses(found[1])}
        uses |= {("crate", *found[1].split("::")) for found in in_code(text, _PATH.finditer(text))}
        self._uses[path] = uses

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` declares as modules or uses."""
        folder = posixpath.dirname(path)
        found = {
            posixpath.normpath(posixpath.join(folder, given))
            if given
            else self._file(posixpath.join(_inside(path), name))
            for given, name in self._children[path]
        }
        found |= {self._used(use, path) for use in self._uses[path]}
        return {target for target in found if target in self._paths and target is not None and target != path}

    def _used(self, use: tuple[str, ...], path: str) -> str | None:
        first, rest = use[0], list(use[1:])
        if first == "crate":
            start: str | None = self._root(path)
        elif first in ("self", "super"):
            start = _inside(path)
            while first == "super" or (rest and rest[0] == "super"):
                start = posixpath.dirname(start)
                if first != "super":
                    rest.pop(0)
                first = "self"
        else:
            inside = (
                self._walk(_inside(path), [first, *rest]) if self._file(posixpath.join(_inside(path), first)) else None
            )
            if inside is not None or first not in self._crates:
                return inside
            start = self._crates[first]
        return None if start is None else self._walk(start, rest)

    def _walk(self, start: str, names: list[str]) -> str | None:
        """The last module with a file on the way from folder `start` along `names`."""
        found = self._module_of(start)
        for name in names:
            start = posixpath.join(start, name)
            below = self._file(start)
            if below is None:
                break
            found = below
        return found

    def _module_of(self, folder: str) -> str | None:
        for name in _CRATE_FILES:
            if posixpath.join(folder, name) in self._paths:
                return posixpath.join(folder, name)
        return self._file(folder) if folder else None

    def _file(self, module: str) -> str | None:
        for path in (f"{module}.rs", f"{module}/mod.rs"):
            if path in self._paths:
                return path
        return None

    def _root(self, path: str) -> str | None:
        within = [root for root in self._roots if not root or path.startswith(f"{root}/")]
        return within[-1] if within else None


def _inside(path: str) -> str:
    """The folder that holds the child modules of the module at `path`."""
    folder, name = posixpath.split(path)
    return folder if name in (*_CRATE_FILES, "mod.rs") else posixpath.join(folder, name.removesuffix(".rs"))
