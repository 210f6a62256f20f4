"""Recall and precision of the dependency edges against independent resolvers, on real projects.

    python tools/check_imports.py --projects DIR --typescript /usr/share/nodejs/typescript --output imports.json

Ground truth: for Python, `ast` on packages installed here; for Java, C, C++ and Go, tree-sitter and the project's own
build files; for JavaScript and TypeScript, the TypeScript compiler (Debian's node-typescript). `DIR` holds sources of
Debian packages in folders of the packages' names (`apt-get source`); missing packages are skipped.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_common import machine, run_tool
from import_truth import python_ast, syntax

from megacoder.core.config import parse_args
from megacoder.core.files import write_json
from megacoder.corpus.dependencies import repository_dependencies
from megacoder.corpus.documents import Document
from megacoder.corpus.languages import language_of
from megacoder.corpus.reading import Selection
from megacoder.corpus.sources import Repository

PYTHON = ("networkx", "rich", "transformers", "sympy", "numpy", "torch", "pip", "hypothesis", "mypy")
JAVA: dict[str, list[str]] = {
    # project: folders with copies of it for other platforms
    "libcommons-lang3-java": [],
    "guava-libraries": ["android"],
    "jackson-databind": [],
    "junit5": [],
}
C = {
    # project: folders that its build gives as -I, relative to its root
    "redis": [
        "src", "deps/hiredis", "deps/linenoise", "deps/lua/src", "deps/hdr_histogram", "deps/jemalloc/include",
        "deps/jemalloc/test/include",
    ],
    "leveldb": ["", "include"],
    "curl": ["include", "lib", "src", "tests/libtest", "tests/server", "tests/unit"],
    "libgit2": [
        "include", "src/libgit2", "src/util", "src/cli", "tests/clar", "tests/libgit2", "deps/pcre", "deps/ntlmclient",
        "deps/http-parser", "deps/zlib",
    ],
    "re2": [""],
    "fmtlib": ["include", "test", "test/gtest"],
}  # fmt: skip
GO = ("golang-github-spf13-cobra", "restic", "gh", "golang-golang-x-tools")
JAVASCRIPT = ("eslint", "node-express", "node-webpack")
TYPESCRIPT = ("node-babel7", "node-ajv", "node-got")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Import edges beside those of independent resolvers."""

    projects: Path | None = None
    """folder of Debian sources"""
    typescript: Path | None = None
    """folder of the typescript package"""
    output: Path | None = None
    """JSON file to write"""
    show: int = 0
    """edges to print of those missed, and of those too many"""
    python: bool = True
    """also the packages installed here"""


def read(root: Path, languages: set[str], prefix: str = "") -> dict[str, str]:
    """{path: text} of a project's files in these languages."""
    repository = Repository(name="project", root=root, prefix=prefix)
    items = repository.read(Selection(languages=frozenset(languages), max_file_bytes=1 << 24))
    return {item.path: item.text for item in items if isinstance(item, Document)}


def our_edges(files: Mapping[str, str], language: str) -> set[tuple[str, str]]:
    """The edges that the corpus pipeline finds."""
    paths = sorted(files)
    languages = {path: language_of(path) or language for path in paths}
    found = repository_dependencies(languages, [(path, files[path]) for path in paths])
    return {(paths[index], paths[target]) for index, targets in enumerate(found) for target in targets}


def compared(
    project: str, language: str, files: Mapping[str, str], truth: set[tuple[str, str]], show: int
) -> dict[str, Any]:
    """One row of the results."""
    ours = our_edges(files, language)
    for sign, edges in (("missed", truth - ours), ("extra", ours - truth)):
        for edge in sorted(edges)[:show]:
            print(f"  {sign}: {edge[0]} -> {edge[1]}", file=sys.stderr)
    both = len(ours & truth)
    rates = rates_of(both, len(truth), len(ours))
    counts = {"files": len(files), "truth": len(truth), "found": len(ours), "both": both}
    print(f"{language:12}{project:44}", *(f"{name} {value}" for name, value in (counts | rates).items()))
    return {"language": language, "project": project, **counts, **rates}


def python_rows(show: int) -> list[dict[str, Any]]:
    rows = []
    for package in PYTHON:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        found = read(Path(spec.origin).parent, {"Python"}, f"{package}/")
        files = {path: text for path, text in found.items() if path.endswith(".py")}
        version = importlib.metadata.version(package)
        rows.append(compared(f"{package} {version}", "Python", files, python_ast.edges(files), show))
    return rows


def project_rows(projects: Path, typescript: Path | None, show: int) -> list[dict[str, Any]]:
    def there(names: Iterable[str]) -> list[Path]:
        return [projects / name for name in names if (projects / name).is_dir()]

    rows = []
    for project in there(JAVA):
        files = read(project, {"Java"})
        truth = syntax.java_edges(files, JAVA[project.name])
        rows.append(compared(_versioned(project), "Java", files, truth, show))
    for project in there(C):
        files = read(project, {"C", "C++"})
        rows.append(compared(_versioned(project), "C/C++", files, syntax.c_edges(files, C[project.name]), show))
    for project in there(GO):
        files = read(project, {"Go"})
        modules = {str(path.relative_to(project)): path.read_text() for path in project.rglob("go.mod")}
        rows.append(compared(_versioned(project), "Go", files, syntax.go_edges(files, modules), show))
    for language, names in (("JavaScript", JAVASCRIPT), ("TypeScript", TYPESCRIPT)):
        for project in there(names if typescript else ()):
            files = read(project, {"JavaScript", "TypeScript", "JSON"})
            rows.append(
                compared(_versioned(project), language, files, typescript_edges(project, files, typescript), show)
            )
    return rows


def typescript_edges(project: Path, files: Mapping[str, str], typescript: Path | None) -> set[tuple[str, str]]:
    """Edges between `files` by the compiler."""
    script = Path(__file__).parent / "import_truth/typescript.js"
    sources = [path for path in files if not path.endswith(".json")]
    command = ["node", str(script), str(typescript), str(project)]
    told = subprocess.run(command, input="\n".join(sources), capture_output=True, text=True, check=True).stdout
    return {(a, b) for a, b in json.loads(told) if a != b and b in files}


def _versioned(project: Path) -> str:
    """The Debian source package, with its version where its packaging is there."""
    changelog = project / "debian/changelog"
    if not changelog.exists():
        return project.name
    name, version = changelog.read_text().split("\n")[0].split()[:2]
    return f"{name} {version.strip('()')}"


def rates_of(both: int, truth: int, found: int) -> dict[str, float]:
    return {"recall": round(both / max(truth, 1), 4), "precision": round(both / max(found, 1), 4)}


def main() -> None:
    options = parse_args(Options, None, prog="check_imports.py")
    rows = python_rows(options.show) if options.python else []
    rows += project_rows(options.projects, options.typescript, options.show) if options.projects else []
    totals = {}
    for language in dict.fromkeys(row["language"] for row in rows):
        mine = [row for row in rows if row["language"] == language]
        both, truth, found = (sum(row[key] for row in mine) for key in ("both", "truth", "found"))
        totals[language] = {"projects": len(mine), "edges": truth, **rates_of(both, truth, found)}
        print(f"{language:12}", totals[language])
    if options.output:
        write_json(options.output, {"machine": machine(), "totals": totals, "projects": rows})


if __name__ == "__main__":
    run_tool(main)
