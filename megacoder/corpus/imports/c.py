"""The C family's `#include`: which file of the repository each one means.

A name is looked for beside the including file, then as the end of any path in the repository, since include
directories are known only to the build system. Of several matches, the one under the include directory to which most of
the unambiguous includes in the same folder lead is chosen, then the one that shares most of the includer's path.
`<string.h>` and the other headers of the C standard and of POSIX are the system's.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Collection

from megacoder.corpus.imports.lookup import SuffixIndex, nearest_path

__all__ = ["CIncludes"]

_INCLUDE = re.compile(r"^[ \t]*+#[ \t]*+include[ \t]*+([<\"])([^>\"\n]++)[>\"]", re.MULTILINE)
_C_STANDARD_NAMES = """
    assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic
    stdbit stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype
"""
_POSIX_NAMES = """
    aio arpa/inet dirent dlfcn fcntl fnmatch ftw getopt glob grp iconv langinfo libgen net/if netdb netinet/in
    netinet/tcp poll pthread pwd regex sched search semaphore spawn strings sys/ioctl sys/mman sys/param sys/resource
    sys/select sys/socket sys/stat sys/time sys/types sys/uio sys/un sys/wait syslog termios unistd utime
"""
_C_STANDARD = frozenset(f"{name}.h" for name in _C_STANDARD_NAMES.split())
_POSIX = frozenset(f"{name}.h" for name in _POSIX_NAMES.split())


class CIncludes:
    """Resolves the includes of one repository's C, C++ and CUDA files; a `Resolver`."""

    languages = frozenset({"C", "C++", "CUDA"})

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = frozenset(paths)
        self._index = SuffixIndex(paths)
        self._includes: dict[str, set[tuple[str, str]]] = {}
        self._bases: dict[str, Counter[str]] | None = None
        self._found: dict[tuple[str, str, str], str | None] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file includes."""
        self._includes[path] = {(quote, name.strip()) for quote, name in _INCLUDE.findall(text)}

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` includes."""
        if self._bases is None:
            self._bases = self._include_folders()
        folder = posixpath.dirname(path)
        found = {self._cached(quote, name, folder) for quote, name in self._includes[path]}
        return {target for target in found if target is not None and target != path}

    def _include_folders(self) -> dict[str, Counter[str]]:
        """Folder -> the include directories to which its files' unambiguous includes lead, counted."""
        bases: dict[str, Counter[str]] = {}
        for path, includes in self._includes.items():
            folder = posixpath.dirname(path)
            counts = bases.setdefault(folder, Counter())
            for quote, name in includes:
                if not (quote == '"' and posixpath.join(folder, name) in self._paths):
                    ending = _ending(name)
                    candidates = self._index.ending(ending)
                    if len(candidates) == 1:
                        counts[_base(candidates[0], ending)] += 1
        return bases

    def _cached(self, quote: str, name: str, folder: str) -> str | None:
        key = (quote, name, folder)
        if key not in self._found:
            self._found[key] = self._resolve(quote, name, folder)
        return self._found[key]

    def _resolve(self, quote: str, name: str, folder: str) -> str | None:
        beside = posixpath.normpath(posixpath.join(folder, name))
        if quote == '"' and beside in self._paths:
            return beside
        if name in _C_STANDARD or (quote == "<" and name in _POSIX):
            return None
        ending = _ending(name)
        candidates = self._index.ending(ending)
        if len(candidates) > 1 and self._bases is not None:
            votes = self._bases[folder]
            most = max(votes[_base(path, ending)] for path in candidates)
            candidates = [path for path in candidates if votes[_base(path, ending)] == most]
        return nearest_path(candidates, folder)


def _ending(name: str) -> str:
    return posixpath.normpath(name).lstrip("./")


def _base(path: str, ending: str) -> str:
    return path[: -len(ending)]
