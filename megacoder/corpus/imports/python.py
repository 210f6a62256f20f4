"""Python's imports: which file of the repository each one means.

Found by one lexing expression rather than by `ast`: it steps over strings and comments, so that an import shown in a
docstring does not count, and it reads Python 2 and files with a syntax error too. Resolution follows Python's rules as
far as files show them: relative imports from the package; absolute ones from the folder above the importing file's
outermost package, then from the folders above that, then from a package of that name anywhere in the repository.
A standard-library module is never resolved to a file (`import typing` in a package with a `typing.py`), except in a
repository that is a standard library itself.
"""

import posixpath
import re
import sys
from collections.abc import Collection, Iterator

__all__ = ["PythonImports", "python_imports"]

# Whatever is never closed runs to the end of the text: a second try at each quote would take quadratic time.
_STRING = r"""(?:"{3}[^"\\]*+(?:(?:\\(?:.|\Z)|"(?!""))[^"\\]*+)*+(?:"{3}|\Z)
               |'{3}[^'\\]*+(?:(?:\\(?:.|\Z)|'(?!''))[^'\\]*+)*+(?:'{3}|\Z)
               |"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|'[^'\\\n]*+(?:\\.[^'\\\n]*+)*+')"""
_TOKEN = re.compile(
    rf"""{_STRING}
    |\#[^\n]*+
    |[\n:;][ \t]*+(?:
        from[ \t]*+(?P<origin>(?<=[ \t])[\w.]++|\.[\w.]*+)(?:[ \t]|\\\n)*+import\b(?:[ \t]|\\\n)*+
            (?P<names>\((?:[^)\#]|\#[^\n]*+)*+(?:\)|\Z)|(?:[^\n;\#\\]|\\\n)++)
        |import[ \t]++(?P<modules>(?:[^\n;\#\\]|\\\n)++)
    )""",
    re.VERBOSE | re.DOTALL,
)
_NOISE = re.compile(r"\#[^\n]*|[()\\\s]+")
_SOURCE_FOLDERS = ("", "src/", "lib/", "python/")
_STDLIB = sys.stdlib_module_names
_STDLIB_SIZE = 20  # a folder with this many standard-library modules is a standard library, such as CPython's Lib


def python_imports(text: str) -> Iterator[tuple[str, str | None]]:
    """Yields (module, name) of each import: `import a.b` -> ('a.b', None), `from ..a import b` -> ('..a', 'b')."""
    for token in _TOKEN.finditer("\n" + text[: _end_of_imports(text)]):
        if token["origin"] is not None:
            for name in _names(token["names"]):
                yield token["origin"], name
        elif token["modules"] is not None:
            for module in _names(token["modules"]):
                yield module, None


class PythonImports:
    """Resolves the imports of one repository's Python files; a `Resolver`."""

    languages = frozenset({"Python"})

    def __init__(self, paths: Collection[str]) -> None:
        self._modules: dict[str, str] = {}  # "a/b" -> "a/b/__init__.py" or "a/b.py"
        self._packages: set[str] = set()  # folders with an __init__
        for path in sorted(paths, key=_preference):
            module = path.rpartition(".")[0]
            if posixpath.basename(module) == "__init__":
                module = posixpath.dirname(module)
                self._packages.add(module)
            self._modules.setdefault(module, path)
        self._roots_of: dict[str, list[str]] = {}  # top-level package name -> folders that hold it
        for package in sorted(self._packages):
            if posixpath.dirname(package) not in self._packages:
                self._roots_of.setdefault(posixpath.basename(package), []).append(posixpath.dirname(package))
        self._stdlib_roots = self._find_stdlib_roots()
        self._search_paths: dict[str, list[str]] = {}
        self._imports: dict[str, set[tuple[str, str | None]]] = {}
        self._found: dict[tuple[str, str | None, str], str | None] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file imports."""
        self._imports[path] = set(python_imports(text))

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` imports."""
        folder = posixpath.dirname(path)
        found = {self._cached(module, name, folder) for module, name in self._imports[path]}
        return {target for target in found if target is not None and target != path}

    def _cached(self, module: str, name: str | None, folder: str) -> str | None:
        key = (module, name, folder)
        if key not in self._found:
            self._found[key] = self._resolve(module, name, folder)
        return self._found[key]

    def _resolve(self, module: str, name: str | None, folder: str) -> str | None:
        relative = len(module) - len(module.lstrip("."))
        if relative:
            for _ in range(relative - 1):
                if not folder:
                    return None  # beyond the repository
                folder = posixpath.dirname(folder)
            base = posixpath.join(folder, module.lstrip(".").replace(".", "/")).rstrip("/")
            return self._lookup(base, name)
        top = module.partition(".")[0]
        module = module.replace(".", "/")
        for root in [*self._search_path(folder), *self._nearest(top, folder)]:
            if top in _STDLIB and root not in self._stdlib_roots:
                continue
            if target := self._lookup(f"{root}/{module}" if root else module, name):
                return target
        return None

    def _lookup(self, module: str, name: str | None) -> str | None:
        """`from module import name` means the sub-module of that name if there is one, else the module."""
        return (self._modules.get(f"{module}/{name}".lstrip("/")) if name else None) or self._modules.get(module)

    def _search_path(self, folder: str) -> list[str]:
        """Folders that Python could have on its path for a file in `folder`, nearest first."""
        if folder not in self._search_paths:
            root = folder
            while root in self._packages and root:
                root = posixpath.dirname(root)
            above = [root]
            while above[-1]:
                above.append(posixpath.dirname(above[-1]))
            roots = [posixpath.join(parent, source).rstrip("/") for parent in above for source in _SOURCE_FOLDERS]
            self._search_paths[folder] = [
                root for root in dict.fromkeys(roots) if root not in self._packages or not root
            ]
        return self._search_paths[folder]

    def _nearest(self, top: str, folder: str) -> list[str]:
        """Folders anywhere in the repository that hold a package called `top`, those nearest to `folder` first."""
        return sorted(
            self._roots_of.get(top, ()), key=lambda root: (-len(posixpath.commonprefix([root, folder])), root)
        )

    def _find_stdlib_roots(self) -> set[str]:
        counts: dict[str, int] = {}
        for module in self._modules:
            folder, _, name = module.rpartition("/")
            counts[folder] = counts.get(folder, 0) + (name in _STDLIB)
        return {folder for folder, count in counts.items() if count >= _STDLIB_SIZE}


def _preference(path: str) -> tuple[bool, bool, str]:
    """Sorts the file that Python would load first: a package before a module, source before a stub."""
    stem, _, extension = path.rpartition(".")
    return posixpath.basename(stem) != "__init__", extension != "py", path


def _end_of_imports(text: str) -> int:
    """A position after which no import statement and no single-line string continues."""
    last = text.rfind("import")  # a word of the last statement, or of a comment in its list
    if last < 0:
        return 0
    closes = text.find(")", last)
    while closes >= 0 and "#" in text[text.rfind("\n", 0, closes) + 1 : closes]:
        closes = text.find(")", closes + 1)
    end = text.find("\n", closes) if closes >= 0 else -1
    while end > 0 and text[end - 1] == "\\":
        end = text.find("\n", end + 1)
    return len(text) if end < 0 else end


def _names(listed: str) -> list[str]:
    """The names in `a as b, c`, without their aliases."""
    words = (part.split() for part in _NOISE.sub(" ", listed).split(","))
    return [word[0] for word in words if word]
