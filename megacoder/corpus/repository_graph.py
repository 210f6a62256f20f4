"""The dependencies between the files of a repository in a finished corpus, to be drawn.

Texts come from the corpus itself and dropped files are known by name, so the edges are those by which the build ordered
the files, except in a repository whose files are split between training and held out.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacoder.core.config import did_you_mean
from megacoder.core.errors import CorpusError
from megacoder.corpus.accounts import CorpusReport
from megacoder.corpus.dependencies import linked_files, repository_dependencies
from megacoder.corpus.findings import read_part
from megacoder.corpus.order import dependency_order
from megacoder.corpus.samples import path_comment

__all__ = ["DependencyGraph", "repository_graph"]

_FEW_FILES = 40
_CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class DependencyGraph:
    """One repository's kept files that depend on one another."""

    repository: str
    files: tuple[str, ...]
    """those with an edge, in dependency order"""
    edges: tuple[tuple[int, int], ...]
    """positions (a, b) in `files`: b depends on a"""
    alone: int
    """kept files without an edge"""

    def to_plain(self) -> dict[str, Any]:
        """For JSON, with paths: [dependent, dependency]."""
        edges = [[self.files[b], self.files[a]] for a, b in self.edges]
        return {"repository": self.repository, "files": list(self.files), "depends_on": edges, "alone": self.alone}

    def busiest(self, limit: int) -> "DependencyGraph":
        """Only the `limit` files with the most edges, and the edges between them."""
        degree = [0] * len(self.files)
        for edge in self.edges:
            for end in edge:
                degree[end] += 1
        kept = sorted(sorted(range(len(self.files)), key=lambda node: -degree[node])[:limit])
        place = {node: index for index, node in enumerate(kept)}
        return DependencyGraph(
            repository=self.repository,
            files=tuple(self.files[node] for node in kept),
            edges=tuple((place[a], place[b]) for a, b in self.edges if a in place and b in place),
            alone=self.alone,
        )


def repository_graph(out: Path, report: CorpusReport, name: str | None = None) -> DependencyGraph:
    """The graph of the repository called `name`, by default of a large one that can still be drawn completely.

    That is: of the 8 largest with at most 40 files, the one with the most edges; where all have more files, the
    smallest. CorpusError for a name that the corpus does not hold.
    """
    kept = {name: row.kept.files for name, row in sorted(report.accounts.repositories.items()) if row.kept.files}
    if name is not None:
        if name not in kept:
            raise CorpusError(f"{str(out)!r} holds no file of a repository {name!r}{did_you_mean(name, kept)}")
        names = [name]
    else:
        few = sorted((name for name in kept if kept[name] <= _FEW_FILES), key=lambda name: -kept[name])
        names = few[:_CANDIDATES] or [min(kept, key=kept.__getitem__)]
    return max(_graphs(out, report, names), key=lambda graph: len(graph.edges))


def _graphs(out: Path, report: CorpusReport, names: Collection[str]) -> list[DependencyGraph]:
    """In the order of `names`; the texts of these repositories are held in memory."""
    languages: dict[str, dict[str, str]] = {name: {} for name in names}
    texts: dict[str, dict[str, str]] = {name: {} for name in names}
    style = report.config["samples"]["comments"]
    for part in ("train", "heldout"):
        for row in read_part(out, report, part, ["repo", "path", "language", "content"], where=("repo", names)):
            repo, path, language = row["repo"], row["path"], row["language"]
            languages[repo][path] = language
            texts[repo][path] = row["content"].removeprefix(f"{path_comment(path, language, style)}\n")
    for row in read_part(out, report, "dropped", ["repo", "path", "language"], where=("repo", names)):
        if row["language"] is not None:
            languages[row["repo"]][row["path"]] = row["language"]
    return [_graph(name, languages[name], texts[name]) for name in names]


def _graph(name: str, languages: dict[str, str], texts: dict[str, str]) -> DependencyGraph:
    files = sorted(texts.items())
    depends_on = repository_dependencies(dict(sorted(languages.items())), files)
    linked = sorted(linked_files(depends_on))
    order = dependency_order(linked, depends_on)
    place = {node: index for index, node in enumerate(order)}
    return DependencyGraph(
        repository=name,
        files=tuple(files[node][0] for node in order),
        edges=tuple(sorted((place[other], place[node]) for node in order for other in depends_on[node])),
        alone=len(files) - len(linked),
    )
