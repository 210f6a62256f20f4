"""What a finished corpus holds, what was dropped on the way and why: as table rows, as JSON and as one HTML file.

The accounts give the amounts; the records of drops, the copies and the tests; the files themselves, the dependencies.
The terminal, this page and the quickstart's page show the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacoder.core.console import counted
from megacoder.core.errors import FormatError
from megacoder.core.files import write_text
from megacoder.core.html import page, paragraph, section, tiles, value_table
from megacoder.core.layered_graph import layered_graph
from megacoder.corpus.accounts import CorpusReport, corpus_json, load_report
from megacoder.corpus.findings import Cluster, Findings, read_findings
from megacoder.corpus.repository_graph import DependencyGraph, repository_graph
from megacoder.corpus.screening import unscreened
from megacoder.version import __version__

__all__ = ["FullReport", "file_rows", "full_report", "language_rows", "repository_rows"]

Rows = list[list[str]]

_MOST_DRAWN = 40
_MOST_CLUSTERS, _MOST_COPIES, _MOST_CONTAMINATED, _MOST_REPOSITORIES = 20, 10, 100, 20  # on the page; JSON has all


@dataclass(frozen=True, kw_only=True)
class FullReport:
    """Everything reported about the corpus in `folder`."""

    folder: Path
    corpus: CorpusReport
    findings: Findings
    graph: DependencyGraph
    unscreened: tuple[str, ...]
    """languages of kept files that no parser has checked"""

    def to_plain(self) -> dict[str, Any]:
        """For JSON: the accounts of `corpus.json`, and the findings."""
        accounts = self.corpus.accounts
        shares = {name: count.bytes / accounts.kept.bytes for name, count in accounts.languages.items()}
        return corpus_json(self.corpus) | {
            "version": __version__,
            "language_shares": shares,
            "unscreened_languages": list(self.unscreened),
            "near_copies": [cluster.to_plain() for cluster in self.findings.clusters],
            "contamination": [file.to_plain() for file in self.findings.contaminated],
            "dependency_graph": self.graph.to_plain(),
        }  # fmt: skip

    def write_page(self, path: Path) -> None:
        """Writes the HTML file."""
        body = [
            self._headline(), self._languages(), self._dropped(), self._copies(), self._contamination(),
            self._dependencies(), self._repositories(),
        ]  # fmt: skip
        config = self.corpus.config
        lead = f"megacoder {__version__}; from {', '.join(config['input']) or 'sources installed on this machine'}"
        write_text(path, page(f"Corpus {self.folder.resolve().name}", lead, body))

    def _headline(self) -> str:
        accounts = self.corpus.accounts
        return tiles(
            [
                ("kept", accounts.kept.megabytes),
                ("files kept", f"{accounts.kept.files:,}"),
                ("of files seen", f"{accounts.kept.files / accounts.seen.files:.1%}"),
                ("samples", f"{accounts.num_samples:,}"),
                ("of several files", f"{accounts.multi_file_samples:,}"),
            ]
        )

    def _languages(self) -> str:
        said = "Every one of these languages was screened by a parser."
        if self.unscreened:
            said = f"Not screened for syntax: {', '.join(self.unscreened)}."
        columns = ["language", "size", "files", "share"]
        return section("Kept, by language", value_table(columns, language_rows(self.corpus)), paragraph(said))

    def _dropped(self) -> str:
        rows = file_rows(self.corpus)
        return section("Every file seen", value_table(["", "files", "size"], rows, caption="kept, or dropped and why"))

    def _copies(self) -> str:
        clusters, level = self.findings.clusters, self.corpus.config["near_dedup"]["level"]
        dropped = self.corpus.accounts.dropped.get("dedup", {}).values()
        exact = f"Files dropped because an earlier one has the same text: {sum(count.files for count in dropped):,}."
        if self.corpus.config.get("exact_dedup") in ("none", False):  # False: of format 5
            exact = "Single files with the same text were not searched for."
        if level == "none":
            return section("Copies", paragraph(f"{exact} Near copies were not searched for."))
        number = sum(len(cluster.copies) for cluster in clusters)
        near = f"Near copies dropped: {number:,}, in {counted(len(clusters), 'cluster', 'clusters')}."
        parts = [paragraph(f"{exact} {near}")]
        if clusters:
            rows = [row for cluster in clusters[:_MOST_CLUSTERS] for row in _cluster_rows(cluster)]
            columns = ["kept", "dropped as its near copy", "similarity", "files", "size"]
            parts.append(value_table(columns, rows, num_texts=2, caption=_first(clusters, _MOST_CLUSTERS, "clusters")))
        return section("Copies", *parts)

    def _contamination(self) -> str:
        found, benchmarks = self.findings.contaminated, self.corpus.config["benchmarks"]
        if not benchmarks:
            return section("Contamination", paragraph("No benchmark was given to search for."))
        names = ", ".join(name.rpartition(" ")[0] for name in benchmarks)  # each entry is a name and a digest
        tests = len({test for file in found for test, _ in file.hits})
        said = f"{counted(len(found), 'file held', 'files held')} a piece of {counted(tests, 'test', 'tests')} of"
        parts = [paragraph(f"{said} {names}." if found else f"No file held a piece of {names}.")]
        if found:
            rows = [
                ["" if index else f"{file.repo}/{file.path}", test, words]
                for file in found[:_MOST_CONTAMINATED]
                for index, (test, words) in enumerate(file.hits)
            ]
            caption = _first(found, _MOST_CONTAMINATED, "files")
            parts.append(value_table(["file", "test", "words in both"], rows, num_texts=3, caption=caption))
        return section("Contamination", *parts)

    def _dependencies(self) -> str:
        graph, title = self.graph, f"Dependencies in {self.graph.repository}"
        if not graph.edges:
            return section(title, paragraph("No file depends on another."))
        drawn = graph.busiest(_MOST_DRAWN)
        cut = len(drawn.files) < len(graph.files)
        shown = f"The {len(drawn.files)} of {len(graph.files):,} files with the most edges" if cut else "Files"
        alone = f"; {counted(graph.alone, 'file has', 'files have')} none" if graph.alone else ""
        said = (
            f"{shown}, dependencies to the left of the files that need them; a dashed edge closes a cycle. "
            f"{counted(len(graph.edges), 'edge', 'edges')} in all{alone}."
        )
        drawing = layered_graph(drawn.files, drawn.edges, describes=f"dependencies in {graph.repository}")
        return section(title, paragraph(said), drawing)

    def _repositories(self) -> str:
        columns = ["repository", "files seen", "kept", "size", "samples", "part"]
        rows = repository_rows(self.corpus)
        caption = _first(rows, _MOST_REPOSITORIES, "repositories")
        return section("Repositories", value_table(columns, rows[:_MOST_REPOSITORIES], caption=caption))


def full_report(folder: Path, *, repository: str | None = None) -> FullReport:
    """Reads the corpus in `folder`; `repository` is the one to draw (see `repository_graph`).

    CorpusError if there is no finished corpus or no such repository, FormatError for a damaged file.
    """
    corpus = load_report(folder)
    for name in ("near_dedup", "screening", "benchmarks", "samples"):
        if name not in corpus.config:
            raise FormatError(f"{folder}: built by an earlier version, without {name!r}; build it again for a report")
    screening = corpus.config["screening"]
    unknown = unscreened(corpus.accounts.languages, syntax=screening["syntax"], off=screening["off"])
    return FullReport(
        folder=folder,
        corpus=corpus,
        findings=read_findings(folder, corpus),
        graph=repository_graph(folder, corpus, repository),
        unscreened=tuple(unknown),
    )


def language_rows(corpus: CorpusReport) -> Rows:
    """Table 1 of the paper for this corpus, largest first: language, size, files, share of the kept bytes."""
    accounts = corpus.accounts
    languages = sorted(accounts.languages.items(), key=lambda item: -item[1].bytes)
    return [
        [name, count.megabytes, f"{count.files:,}", f"{count.bytes / accounts.kept.bytes:.2%}"]
        for name, count in languages
    ]


def file_rows(corpus: CorpusReport) -> Rows:
    """The account of every file: what, files, size."""
    return [[name, f"{count.files:,}", count.megabytes] for name, count in corpus.accounts.rows(corpus.split_unit)]


def repository_rows(corpus: CorpusReport) -> Rows:
    """Repositories, largest first: name, files seen, kept, size, samples, whether held out."""
    largest = sorted(corpus.accounts.repositories.items(), key=lambda item: -item[1].kept.bytes)
    return [
        [
            name, f"{row.seen.files:,}", f"{row.kept.files:,}", row.kept.megabytes, f"{row.samples:,}",
            "" if not row.heldout.files else "held out" if row.heldout == row.kept else "split",
        ]
        for name, row in largest
    ]  # fmt: skip


def _cluster_rows(cluster: Cluster) -> Rows:
    rows = [
        ["", copy.name, f"{copy.similarity:.2f}", f"{copy.count.files:,}", copy.count.megabytes]
        for copy in cluster.copies[:_MOST_COPIES]
    ]
    rows[0][0] = cluster.keeper
    more = len(cluster.copies) - _MOST_COPIES
    return [*rows, ["", f"and {more:,} more", "", "", ""]] if more > 0 else rows


def _first(items: Sequence[Any], limit: int, what: str) -> str:
    return f"the first {limit} of {len(items):,} {what}" if len(items) > limit else ""
