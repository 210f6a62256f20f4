"""The C family's `#include`: which file of the repository each one means.

A name is looked for beside the including file, then as the end of any path in the repository, since include
directories are known only to the build system; among several the one that shares most of the including file's path
is taken. `<string.h>` and the other headers of the C standard are the system's.
"""

import posixpath
import re
from collections.abc import Collection

from megacoder.corpus.imports.lookup import SuffixIndex, nearest_path

__all__ = ["CIncludes"]

_INCLUDE = re.compile(r"^[ \t]*+#[ \t]*+include[ \t]*+([<\"])([^>\"\n]++)[>\"]", re.MULTILINE)
_C_STANDARD_NAMES = """
    assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic
    stdbit stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype
"""
_C_STANDARD = frozenset(f"{name}.h" for name in _C_STANDARD_NAMES.split())


class CIncludes:
    """Resolves the includes of one repository's C, C++ and CUDA files; a `Resolver`."""

    languages = frozenset({"C", "C++", "CUDA"})

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = frozenset(paths)
        self._index = SuffixIndex(paths)
        self._found: dict[tuple[str, str, str], str | None] = {}
        self._includes: dict[str, set[tuple[str, str]]] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file includes."""
        self._includes[path] = {(quote, name.strip()) for quote, name in _INCLUDE.findall(text)}

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` includes."""
        folder = posixpath.dirname(path)
        found = {self._cached(quote, name, folder) for quote, name in self._includes[path]}
        return {target for target in found if target is not None and target != path}

    def _cached(self, quote: str, name: str, folder: str) -> str | None:
        key = (quote, name, folder)
        if key not in self._found:
            self._found[key] = self._resolve(quote, name, folder)
        return self._found[key]

    def _resolve(self, quote: str, name: str, folder: str) -> str | None:
        beside = posixpath.normpath(posixpath.join(folder, name))
        if quote == '"' and beside in self._paths:
            return beside
        if name in _C_STANDARD:
            return None
        ending = posixpath.normpath(name).lstrip("./")
        return nearest_path(self._index.ending(ending), folder)
