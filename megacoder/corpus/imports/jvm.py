"""Java, Kotlin and Scala: imports by qualified name, which the three may take from one another.

A file provides the names that it declares at its top level (for Java, the name of the file) in the package that it
states. An import resolves to its longest prefix that some file provides: the rest is a member or an inner type. A
wildcard import (`.*`, `._`) resolves to those names of the package that the file mentions.
"""

import posixpath
import re
from collections.abc import Collection, Iterator

from megacoder.corpus.imports.lookup import Mentions, in_code, nearest_path

__all__ = ["JvmImports"]

_SPACE = r"(?:\s|//[^\n]*+|/\*.*?\*/|;)*+"
_NAME = r"[\w$`]+(?:\s*\.\s*[\w$`]+)*+"
_ANNOTATION = rf"@(?:file:)?(?:\[[^\]]*\]|{_NAME})(?:\((?:[^()\"]|\"(?:\\.|[^\"\\])*\"|\([^()]*\))*\))?"
_PACKAGE = re.compile(rf"{_SPACE}(?:{_ANNOTATION}{_SPACE})*package\s+({_NAME})", re.DOTALL)
_IMPORT = re.compile(
    rf"{_SPACE}(?:{_ANNOTATION}{_SPACE})*import\s+(?:static\s+)?({_NAME})(\s*\.\s*\*)?(?:\s+as\s+[\w`]+)?", re.DOTALL
)
_SCALA_IMPORT = re.compile(r"^[ \t]*import[ \t]+([^\n{}]+(?:\{[^}]*\})?(?:,[^\n{}]+(?:\{[^}]*\})?)*)", re.MULTILINE)
_SCALA_PACKAGE = re.compile(r"^package[ \t]+(?:object[ \t]+)?([\w.`]+)", re.MULTILINE)
_SCALA_TERM = re.compile(r"([\w.`$]+?)\.?(?:\{([^}]*)\}|\*)?[ \t]*(?:,|$)", re.MULTILINE)
_DECLARED = re.compile(
    r"^(?:(?:@[\w.]+(?:\([^)\n]*\))?|public|internal|private|open|abstract|sealed|data|inline|final|case|implicit|enum"
    r"|annotation|value|suspend|const|lateinit|tailrec|operator|infix|expect|actual|external|lazy|override)[ \t]+)*"
    r"(?:class|interface|object|trait|fun|val|var|typealias|type|def|enum)[ \t]+(?:<[^>\n]*>[ \t]*)?"
    r"(?:[\w<>?, ]+\.)?(`[^`\n]+`|\w+)",
    re.MULTILINE,
)


class JvmImports:
    """A `Resolver` for the languages of the Java virtual machine."""

    languages = frozenset({"Java", "Kotlin", "Scala"})

    def __init__(self, paths: Collection[str]) -> None:
        self._imports: dict[str, list[tuple[str, bool]]] = {}
        self._words = Mentions()
        self._providers: dict[str, list[str]] = {}  # qualified name -> paths
        self._packages: dict[str, dict[int, list[str]]] = {}  # package -> name in it, a word's number -> paths
        self._java = frozenset(path for path in paths if path.endswith(".java"))

    def collect(self, path: str, text: str) -> None:
        """Takes in what the file declares and imports."""
        if path in self._java:
            package, imports = _java_header(text)
            names = {posixpath.basename(path).removesuffix(".java")}
        elif path.endswith((".kt", ".kts")):
            package, imports = _java_header(text)
            names = {posixpath.basename(path).removesuffix(".kt"), *_declared(text)}
        else:
            package = ".".join(_SCALA_PACKAGE.findall(text)).replace("`", "")
            imports = list(_scala_imports(text))
            names = {posixpath.basename(path).rpartition(".")[0], *_declared(text)}
        self._imports[path] = imports
        if any(everything for _, everything in imports):
            self._words.collect(path, text)
        for name in names:
            self._providers.setdefault(f"{package}.{name}".lstrip("."), []).append(path)
            self._packages.setdefault(package, {}).setdefault(self._words.number(name), []).append(path)

    def dependencies(self, path: str) -> set[str]:
        """Paths of the repository's files that the file at `path` imports."""
        folder = posixpath.dirname(path)
        found: set[str] = set()
        mentioned = self._words.of(path)
        for name, everything in self._imports[path]:
            if everything and name in self._packages:
                members = self._packages[name]
                for member in members.keys() & mentioned:
                    found.add(nearest_path(members[member], folder) or path)
            else:
                found.add(self._provider(name, folder) or path)
        return found - {path}

    def _provider(self, name: str, folder: str) -> str | None:
        while name:
            if name in self._providers:
                return nearest_path(self._providers[name], folder)
            name = name.rpartition(".")[0]
            if name in self._packages and name not in self._providers:
                return None  # the package is here, the imported name is not
        return None


def _java_header(text: str) -> tuple[str, list[tuple[str, bool]]]:
    """Package and imports, [(name, whether a wildcard follows)], which precede all other code."""
    position, package, imports = 0, "", []
    if text.startswith("#!"):
        position = text.find("\n") + 1
    if found := _PACKAGE.match(text, position):
        package, position = _plain(found[1]), found.end()
    while found := _IMPORT.match(text, position):
        imports.append((_plain(found[1]), found[2] is not None))
        position = found.end()
    return package, imports


def _scala_imports(text: str) -> Iterator[tuple[str, bool]]:
    for statement in in_code(text, _SCALA_IMPORT.finditer(text)):
        for base, listed in _SCALA_TERM.findall(statement[1].strip()):
            base = base.replace("`", "").removeprefix("_root_.")
            if listed:
                for part in listed.split(","):
                    name = re.split(r"=>|\bas\b", part)[0].strip().strip("`")
                    yield (base, True) if name in ("_", "*", "") else (f"{base}.{name}", False)
            elif base.endswith("._"):
                yield base[:-2], True
            elif base:
                yield base, False


def _declared(text: str) -> set[str]:
    return {name.strip("`") for name in _DECLARED.findall(text)}


def _plain(name: str) -> str:
    return re.sub(r"[\s`]", "", name)
