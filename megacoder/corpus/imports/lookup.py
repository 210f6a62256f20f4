"""What resolvers share: of several files that a name could mean, the nearest; which matches are in comments; and which
words a file holds, for wildcard imports.
"""

import posixpath
import re
from array import array
from collections.abc import Collection, Iterator

__all__ = ["Mentions", "SuffixIndex", "in_code", "nearest_path"]

_WORD = re.compile(r"\w+")
_LINE = 200  # characters searched backwards for the start of a line; longer lines are not source code


def nearest_path(candidates: Collection[str], folder: str) -> str | None:
    """The candidate that shares most folders with `folder`; the first by name among equals, None of none."""
    if len(candidates) <= 1:
        return next(iter(candidates), None)
    parts = folder.split("/")
    return min(candidates, key=lambda path: (-_shared(parts, path.split("/")), path.count("/"), path))


class SuffixIndex:
    """Finds paths by how they end: `a/b.x` is found as `b.x` and as `a/b.x`."""

    def __init__(self, paths: Collection[str]) -> None:
        self._by_basename: dict[str, list[str]] = {}
        for path in sorted(paths):
            self._by_basename.setdefault(posixpath.basename(path), []).append(path)

    def ending(self, suffix: str) -> list[str]:
        """The paths that are `suffix`, or end in it after a `/`, in name order."""
        named = self._by_basename.get(posixpath.basename(suffix), ())
        return [path for path in named if path == suffix or path.endswith(f"/{suffix}")]


class Mentions:
    """The words of each file, as numbers: a repository holds tens of millions, few of them distinct."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._held: dict[str, array[int]] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in the words of one file."""
        self._held[path] = array("I", map(self.number, set(_WORD.findall(text))))

    def number(self, word: str) -> int:
        """The word's number, the same in all files."""
        return self._numbers.setdefault(word, len(self._numbers))

    def of(self, path: str) -> set[int]:
        """Numbers of the words of the file at `path`; none where it was not taken in."""
        return set(self._held.get(path, ()))


def in_code(text: str, matches: Iterator[re.Match[str]]) -> Iterator[re.Match[str]]:
    """Those of the matches that do not begin in a line or block comment of the C family.

    Judged by the line they are in (`//`, or the `*` that runs down the side of a block) and by blocks that open at the
    start of a line.
    """
    opens, closes = text.find("\n/*"), -1
    for match in matches:
        start = match.start()
        while 0 <= opens < start and closes < start:
            end = text.find("*/", opens + 3)
            closes = end if end >= 0 else len(text)
            opens = text.find("\n/*", closes)
        shown = max(start - _LINE, 0)
        line = text[max(text.rfind("\n", shown, start) + 1, shown) : start].lstrip()
        if start < closes or line.startswith(("//", "*", "/*", "#")) or " // " in line:
            continue
        yield match


def _shared(parts: list[str], others: list[str]) -> int:
    count = 0
    for one, other in zip(parts, others, strict=False):
        if one != other:
            break
        count += 1
    return count
