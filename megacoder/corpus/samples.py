"""Training samples of a repository: which files go together, in which order, and how each is written.

A weakly connected group of files, in dependency order, is one sample; each file opens with a comment that holds its
path, and rows of a sample concatenate to its text. A group over the size limit falls back to one sample per file, as
the paper's authors say they did, or by option is cut into runs that fit. Files of languages that no resolver parses
have no edges, so each is a sample by itself.
"""

import hashlib
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from megacoder.core.config import check_at_least
from megacoder.corpus.languages import as_comment
from megacoder.corpus.order import connected_subgraphs, dependency_order

__all__ = ["SampleConfig", "path_comment", "plan_samples", "render", "rendered_bytes"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How files become samples."""

    order: Annotated[Literal["topo", "random", "path"], tyro.conf.arg(aliases=["--order"])] = "topo"
    """order of the files in a sample: dependencies first (the paper), shuffled (as in DeepSeek-Coder-V2), or by path"""
    max_bytes: int = 32768
    """a group of dependent files up to this size becomes one sample"""
    oversize: Literal["files", "cut"] = "files"
    """what becomes of a larger group: one sample per file (the paper), or its order cut into runs that fit"""
    comments: Literal["hash", "language"] = "hash"
    """path comments open with `#` in every language (the paper), or as the language writes comments"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_bytes", prefix="samples.")


def path_comment(path: str, language: str, style: Literal["hash", "language"]) -> str:
    """The line that opens a file in a sample, without the line end."""
    return f"# {path}" if style == "hash" else as_comment(path, language)


def render(path: str, text: str, language: str, style: Literal["hash", "language"]) -> str:
    """The file as a sample holds it: path comment, text, and a line end where the text lacks one."""
    header = path_comment(path, language, style)
    return f"{header}\n{text}" if text.endswith("\n") else f"{header}\n{text}\n"


def rendered_bytes(path: str, text: str, language: str, style: Literal["hash", "language"]) -> int:
    """Bytes in UTF-8 of what `render` returns, without building it."""
    parts = (path_comment(path, language, style), text)
    return sum(len(part) if part.isascii() else len(part.encode()) for part in parts) + 1 + (not text.endswith("\n"))


def plan_samples(
    paths: Sequence[str],
    sizes: Sequence[int],
    depends_on: Sequence[AbstractSet[int]],
    config: SampleConfig,
    *,
    key: str,
) -> list[list[int]]:
    """Groups the files 0..n-1, given in path order, into samples; each file is in exactly one.

    `sizes` are bytes as rendered, `depends_on` as in `dependency_order`; `key` seeds the random order. Samples come in
    the order of their lowest members.
    """
    samples: list[list[int]] = []
    for group in connected_subgraphs(depends_on):
        if len(group) == 1 or (sum(sizes[node] for node in group) > config.max_bytes and config.oversize == "files"):
            samples += ([node] for node in group)
        else:
            samples += _cut(_ordered(group, paths, depends_on, config.order, key), sizes, config.max_bytes)
    return sorted(samples, key=min)


def _ordered(
    group: list[int], paths: Sequence[str], depends_on: Sequence[AbstractSet[int]], order: str, key: str
) -> list[int]:
    if order == "topo":
        return dependency_order(group, depends_on)
    if order == "random":
        return sorted(group, key=lambda node: hashlib.sha256(f"{key}:{paths[node]}".encode()).digest())
    return group


def _cut(order: list[int], sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Runs of consecutive files, each as long as fits; a file over the limit is a run of its own."""
    runs: list[list[int]] = []
    room = 0
    for node in order:
        if sizes[node] > room:
            runs.append([])
            room = max_bytes
        runs[-1].append(node)
        room -= sizes[node]
    return runs
