"""Go: an import names a package, that is a folder: the file depends on all files in it except tests.

A module's import path is in go.mod, which is not a source file, so it is inferred: the prefix under which most imports
lead to folders of the repository. Paths whose first part has no dot are the standard library's, except in a repository
that is the standard library.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator

__all__ = ["GoImports", "go_imports"]

_SPACE = r"(?:\s|;|//[^\n]*+|/\*.*?\*/)*+"
_PACKAGE = re.compile(rf"{_SPACE}package\s+(\w+)", re.DOTALL)
_ONE = re.compile(rf"{_SPACE}(?:[\w.]+\s*)?[\"`]([^\"`\n]+)[\"`]", re.DOTALL)
_OPEN = re.compile(rf"{_SPACE}import\b{_SPACE}(\()?", re.DOTALL)
_CLOSE = re.compile(rf"{_SPACE}\)", re.DOTALL)
_VERSION = re.compile(r"(?:[/.]v\d+)$")
_MIN_SHARE = 0.5
_MIN_NAMES = 3
_PATH_FOLDERS = ("vendor", "src")  # hold other modules by their full import path


def go_imports(text: str) -> Iterator[str]:
    """The import paths of a file, which precede all other code."""
    found = _PACKAGE.match(text)
    position = found.end() if found else 0
    while opening := _OPEN.match(text, position):
        position = opening.end()
        while one := _ONE.match(text, position):
            yield one[1]
            position = one.end()
            if not opening[1]:
                break
        else:
            closing = _CLOSE.match(text, position)
            if closing is None:
                return
            position = closing.end()


class GoImports:
    """A `Resolver` for Go."""

    languages = frozenset({"Go"})

    def __init__(self, paths: Collection[str]) -> None:
        self._folders: dict[str, list[str]] = {}
        for path in sorted(paths):
            if not path.endswith("_test.go"):
                self._folders.setdefault(posixpath.dirname(path), []).append(path)
        self._imports: dict[str, set[str]] = {}
        self._package_of: dict[str, str] = {}  # folder -> name in its package clauses
        self._modules: list[tuple[str, str]] | None = None

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file imports."""
        self._imports[path] = set(go_imports(text))
        if (found := _PACKAGE.match(text)) and not path.endswith("_test.go"):
            self._package_of[posixpath.dirname(path)] = found[1]

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files in the packages that the file at `path` imports."""
        if self._modules is None:
            self._modules = self._find_modules()
        found: set[str] = set()
        for imported in self._imports[path]:
            folder = self._folder(imported, path)
            if folder is not None:
                found.update(self._folders[folder])
        return found - {path}

    def _folder(self, imported: str, path: str) -> str | None:
        if imported.startswith("."):
            folder = posixpath.normpath(posixpath.join(posixpath.dirname(path), imported))
            return folder if folder in self._folders else None
        for prefix, root in self._modules or ():
            if imported == prefix or imported.startswith(f"{prefix}/" if prefix else ""):
                folder = posixpath.join(root, imported[len(prefix) :].lstrip("/")).rstrip("/")
                if folder in self._folders:
                    return folder
        return None

    def _find_modules(self) -> list[tuple[str, str]]:
        """(import path, folder) of each module, the longest import path first."""
        wanted = {name for names in self._imports.values() for name in names if "." in name.split("/")[0]}
        called: dict[str, list[str]] = {}
        for folder in self._folders:
            called.setdefault(posixpath.basename(folder), []).append(folder)
        led: dict[tuple[str, str], set[str]] = {}
        for name in wanted:
            parts = name.split("/")
            for folder in {*called.get(parts[-1], ()), *called.get("", ())}:
                inner = folder.split("/") if folder else []
                shared = 0
                while shared < min(len(parts), len(inner)) and parts[-1 - shared] == inner[-1 - shared]:
                    shared += 1
                if shared or not inner:
                    prefix = "/".join(parts[: len(parts) - shared])
                    led.setdefault((prefix, "/".join(inner[: len(inner) - shared])), set()).add(name)
        below = Counter("/".join(name.split("/")[:n]) for name in wanted for n in range(1, name.count("/") + 2))
        modules: list[tuple[str, str]] = []
        explained: set[str] = set()
        for (prefix, root), names in sorted(led.items(), key=lambda pair: (-len(pair[1]), pair[0])):
            if not names <= explained and self._is_module(prefix, root, names, below[prefix]):
                modules.append((prefix, root))
                explained |= names
        library = [
            ("", root)
            for root in ("src", "")
            if {f"{root}/fmt".lstrip("/"), f"{root}/os".lstrip("/")} <= self._folders.keys()
        ]
        return sorted(modules, key=lambda pair: (-len(pair[0]), pair[1])) + library

    def _is_module(self, prefix: str, root: str, names: set[str], below: int) -> bool:
        """Whether enough of what is imported from under `prefix` lies under the folder `root`."""
        if not prefix:
            return posixpath.basename(root) in _PATH_FOLDERS
        if "/" not in prefix or len(names) < _MIN_SHARE * below:
            return False
        called = _VERSION.sub("", prefix).rpartition("/")[2]
        named = called in (posixpath.basename(root), self._package_of.get(root))
        return named or len(names) >= _MIN_NAMES
