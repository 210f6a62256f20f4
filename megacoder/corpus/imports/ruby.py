"""Ruby: `require_relative` and `load` from the file's folder, `require` and `autoload` from a folder on the load path.

No file states the load path: `lib` folders and the repository's root count as on it, and so does any folder for a name
that matches one file only.
"""

import posixpath
import re
from collections.abc import Collection

from megacoder.corpus.imports.lookup import SuffixIndex, nearest_path

__all__ = ["RubyRequires"]

_REQUIRE = re.compile(
    r"^[ \t]*(?:\w[\w.]*[ \t]*=[ \t]*)?(require_relative|require|load|autoload)\b[ \t]*\(?[ \t]*(?::\w+[ \t]*,[ \t]*)?"
    r"(?:File\.expand_path[ \t]*\(?[ \t]*)?([\"'])([^\"'#\n]+)\2",
    re.MULTILINE,
)
_BLOCK_COMMENT = re.compile(r"^=begin\b.*?^=end\b", re.MULTILINE | re.DOTALL)


class RubyRequires:
    """A `Resolver` for Ruby."""

    languages = frozenset({"Ruby"})

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = frozenset(paths)
        self._index = SuffixIndex(paths)
        self._required: dict[str, set[tuple[str, str]]] = {}

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file requires."""
        if "=begin" in text:
            text = _BLOCK_COMMENT.sub("", text)
        self._required[path] = {(how, name) for how, _, name in _REQUIRE.findall(text)}

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` requires."""
        folder = posixpath.dirname(path)
        found = {self._resolve(how, name, folder) for how, name in self._required[path]}
        return {target for target in found if target is not None and target != path}

    def _resolve(self, how: str, name: str, folder: str) -> str | None:
        file = name if name.endswith(".rb") or how == "load" else f"{name}.rb"
        if how == "require_relative" or name.startswith("."):
            beside = posixpath.normpath(posixpath.join(folder, file))
            return beside if beside in self._paths else None
        candidates = self._index.ending(file)
        loaded = [
            path for path in candidates if _before(path, file) in ("", "lib") or _before(path, file).endswith("/lib")
        ]
        if loaded:
            return nearest_path(loaded, folder)
        return candidates[0] if len(candidates) == 1 and "/" in file else None


def _before(path: str, suffix: str) -> str:
    return path[: -len(suffix)].rstrip("/")
