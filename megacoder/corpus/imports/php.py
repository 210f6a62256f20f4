"""PHP: `use` names a class by its namespace, `require` and `include` a file.

A file provides the classes that it declares in the namespace that it states; that is where an autoloader finds them,
whatever its rules. Files are looked for beside the including one, then from the root, then as the end of any path.
"""

import posixpath
import re
from collections.abc import Collection, Iterator

from megacoder.corpus.imports.lookup import SuffixIndex, in_code, nearest_path

__all__ = ["PhpUses"]

_NAMESPACE = re.compile(r"^[ \t]*(?:<\?php[ \t]+)?namespace[ \t]+([\w\\]+)", re.MULTILINE)
_USE = re.compile(r"^[ \t]*use[ \t]+(?:(?:function|const)[ \t]+)?([\w\\][^;(]*);", re.MULTILINE)
_TYPE = re.compile(
    r"^[ \t]*(?:(?:abstract|final|readonly)[ \t]+)*(?:class|interface|trait|enum)[ \t]+(\w+)", re.MULTILINE
)
_FILE = re.compile(
    r"\b(?:require|include)(?:_once)?[ \t]*\(?[ \t]*(?:(?:__DIR__|dirname\(__FILE__\)|[A-Z_]+)[ \t]*\.[ \t]*)?"
    r"([\"'])([^\"'$\n]+)\1"
)


class PhpUses:
    """A `Resolver` for PHP."""

    languages = frozenset({"PHP"})

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = frozenset(paths)
        self._index = SuffixIndex(paths)
        self._classes: dict[str, list[str]] = {}  # in lower case: class names are case-insensitive
        self._uses: dict[str, set[str]] = {}
        self._files: dict[str, set[str]] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file declares, uses and includes."""
        namespace = next((found[1] for found in in_code(text, _NAMESPACE.finditer(text))), "")
        for found in in_code(text, _TYPE.finditer(text)):
            self._classes.setdefault(f"{namespace}\\{found[1]}".lstrip("\\").lower(), []).append(path)
        uses = in_code(text, _USE.finditer(text))
        self._uses[path] = {name for found in uses for name in _names(found[1])}
        self._files[path] = {found[2].lstrip("/") for found in in_code(text, _FILE.finditer(text))}

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` uses or includes."""
        folder = posixpath.dirname(path)
        found = {nearest_path(self._classes.get(name.lower(), ()), folder) for name in self._uses[path]}
        found |= {self._file(name, folder) for name in self._files[path]}
        return {target for target in found if target is not None and target != path}

    def _file(self, name: str, folder: str) -> str | None:
        for base in (posixpath.normpath(posixpath.join(folder, name)), posixpath.normpath(name)):
            if base in self._paths:
                return base
        return nearest_path(self._index.ending(name.lstrip("./")), folder) if "/" in name else None


def _names(listed: str) -> Iterator[str]:
    """The names in `A\\B as C, D\\{E, F}`."""
    prefix, brace, inner = listed.partition("{")
    for part in (inner.rstrip("} \t\n") if brace else listed).split(","):
        words = part.split()
        if words:
            name = words[1] if words[0] in ("function", "const") and len(words) > 1 else words[0]
            yield (prefix.strip() + name if brace else name).lstrip("\\")
