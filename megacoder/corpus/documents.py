"""What flows through a corpus build: a file with its text, or the record of a dropped file and why.

A stage is a small pure callable from one document to one document or to a `Dropped`; a run is a list of stages. What
needs to see the whole corpus at once (dedup, the split) is not a stage but works on a few columns of all shards.
The invariant behind the accounts: every file that a source yields leaves the run as exactly one of the two types.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Document", "Dropped", "Stage", "run_stages"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A file that did not reach the corpus."""

    repo: str
    path: str
    """relative to the repository, with `/`; undecodable bytes appear as `\\udcXX` escapes"""
    language: str | None
    """None where the file name does not tell"""
    size: int
    """bytes on disk"""
    stage: str
    reason: str
    """a short fixed phrase, so that drops can be counted by it"""
    detail: str | None = None
    """what to record with the reason, if there is more to say"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A source file."""

    repo: str
    path: str
    """relative to the repository, with `/`"""
    language: str
    text: str
    size: int
    """bytes on disk, which the accounts count; a byte order mark is in `size` but not in `text`"""
    license: str | None = None
    """the repository's, as an SPDX expression; None where it is not known"""

    def dropped(self, stage: str, reason: str, detail: str | None = None) -> Dropped:
        """The record that `stage` dropped this file."""
        return Dropped(
            repo=self.repo, path=self.path, language=self.language, size=self.size,
            stage=stage, reason=reason, detail=detail,
        )  # fmt: skip


class Stage(Protocol):
    """One step of a run; must be pure, since shards are redone after a crash and in any order."""

    @property
    def name(self) -> str: ...

    def __call__(self, document: Document) -> Document | Dropped: ...


def run_stages(items: Iterable[Document | Dropped], stages: Sequence[Stage]) -> Iterator[Document | Dropped]:
    """Passes each document through `stages` until one drops it; records of earlier drops pass by untouched."""
    for item in items:
        for stage in stages:
            if isinstance(item, Dropped):
                break
            item = stage(item)
        yield item
