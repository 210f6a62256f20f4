"""The C family's `#include`: which file of the repository each one means.

A name is looked for beside the including file, then as the end of any path in the repository, since include
directories are known only to the build system; among several the one that shares most of the including file's path
is taken. `<string.h>` and the other headers of the C standard are the system's.
"""

import posixpath
import re
from collections.abc import Collection

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
        self._by_basename: dict[str, list[str]] = {}
        for path in sorted(paths):
            self._by_basename.setdefault(posixpath.basename(path), []).append(path)
        self._found: dict[tuple[str, str, str], str | None] = {}

    def dependencies(self, path: str, text: str) -> set[str]:
        """Paths of the repository's files that the file at `path` includes."""
        folder = posixpath.dirname(path)
        found = {self._cached(quote, name.strip(), folder) for quote, name in _INCLUDE.findall(text)}
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
        candidates = [
            path
            for path in self._by_basename.get(posixpath.basename(ending), ())
            if path == ending or path.endswith("/" + ending)
        ]
        return max(candidates, key=lambda path: len(posixpath.commonprefix([path, folder])), default=None)
