"""JavaScript and TypeScript: relative modules as Node and the TypeScript compiler find them, and workspace packages.

A bare name is another package: one in a `node_modules` of a folder above, or this repository's own if one of its
`package.json` files bears that name. Aliases (`@/x`, `~/x`) stand for the nearest `src` folder, as most bundlers are
set up.
"""

import json
import posixpath
import re
from collections.abc import Collection

from megacoder.corpus.imports.lookup import in_code

__all__ = ["JavaScriptImports", "javascript_imports"]

_IMPORT = re.compile(r"\b(?:from|import|require[ \t]*\(|import[ \t]*\()\s*([\"'])([^\"'\n]+)\1")
_REFERENCE = re.compile(r"^///[ \t]*<reference[ \t]+path[ \t]*=[ \t]*[\"']([^\"'\n]+)", re.MULTILINE)
_EXTENSIONS = ("", ".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".mts", ".cts", ".json")
_SOURCE_OF = {
    ".js": (".ts", ".tsx", ".d.ts"),
    ".jsx": (".tsx",),
    ".mjs": (".mts", ".d.mts"),
    ".cjs": (".cts", ".d.cts"),
}
_ENTRIES = ("source", "types", "typings", "module", "main")


def javascript_imports(text: str) -> set[str]:
    """What a file imports, requires or refers to, as written."""
    found = {match[2] for match in in_code(text, _IMPORT.finditer(text))}
    for reference in _REFERENCE.findall(text) if "<reference" in text else ():
        found.add(reference if reference.startswith(".") else f"./{reference}")
    return found


class JavaScriptImports:
    """A `Resolver` for JavaScript and TypeScript."""

    languages = frozenset({"JavaScript", "TypeScript", "JSON"})

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = frozenset(paths)
        self._installed = any("node_modules/" in path for path in paths)
        self._imports: dict[str, set[str]] = {}
        self._packages: dict[str, str] = {}  # name -> folder
        self._entries: dict[str, list[str]] = {}  # folder -> what its package.json calls its entry

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file imports, or the name and entry points in a package.json."""
        if not path.endswith(".json"):
            self._imports[path] = javascript_imports(text)
        elif posixpath.basename(path) == "package.json":
            try:
                manifest = json.loads(text)
            except (ValueError, RecursionError):
                return
            if isinstance(manifest, dict):
                folder = posixpath.dirname(path)
                self._entries[folder] = [manifest[key] for key in _ENTRIES if isinstance(manifest.get(key), str)]
                if isinstance(manifest.get("name"), str) and "node_modules" not in folder:
                    self._packages.setdefault(manifest["name"], folder)

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` imports."""
        folder = posixpath.dirname(path)
        found = {self._resolve(name, folder) for name in self._imports.get(path, ())}
        return {target for target in found if target is not None and target != path}

    def _resolve(self, name: str, folder: str) -> str | None:
        name = name.partition("?")[0]
        if name.startswith((".", "/")):
            return self._module(
                posixpath.normpath(posixpath.join(folder, name.lstrip("/") if name[0] == "/" else name))
            )
        if name.startswith(("@/", "~/")):
            return self._above(name[2:], folder, ("src", ""))
        if self._installed and (target := self._above(f"node_modules/{name}", folder)):
            return target
        package = "/".join(name.split("/")[: 2 if name.startswith("@") else 1])
        if package not in self._packages:
            return None
        root = self._packages[package]
        inner = name[len(package) :].lstrip("/")
        if inner:
            return self._module(posixpath.join(root, inner)) or self._module(posixpath.join(root, "src", inner))
        return self._entry(root) or self._file(posixpath.join(root, "src/index"))

    def _above(self, inner: str, folder: str, beside: tuple[str, ...] = ("",)) -> str | None:
        """The module `inner` in `folder` or the nearest folder above, or in a sub-folder of those named in `beside`."""
        while True:
            for source in beside:
                if target := self._module(posixpath.join(folder, source, inner)):
                    return target
            if not folder:
                return None
            folder = posixpath.dirname(folder)

    def _module(self, base: str) -> str | None:
        """What `base`, a path without `.` and `..`, means: a file, or a folder's entry."""
        if base.startswith(".."):
            return None  # beyond the repository
        return self._file(base) or self._entry("" if base == "." else base)

    def _entry(self, folder: str) -> str | None:
        for entry in (*self._entries.get(folder, ()), "index"):
            path = posixpath.normpath(posixpath.join(folder, entry))
            if target := self._file(path) or self._file(posixpath.join(path, "index")):
                return target
        return None

    def _file(self, base: str) -> str | None:
        """`base` itself, or with an extension, or the source that compiles to it."""
        for extension in _EXTENSIONS:
            if base + extension in self._paths:
                return base + extension
        stem, extension = posixpath.splitext(base)
        for source in _SOURCE_OF.get(extension, ()):
            if stem + source in self._paths:
                return stem + source
        return None
