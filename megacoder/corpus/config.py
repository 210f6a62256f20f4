"""The options of a corpus build, and which of them decide the output."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megacoder.core.config import check_at_least, did_you_mean, to_dict
from megacoder.core.errors import ConfigError
from megacoder.core.native import native
from megacoder.corpus.accounts import heldout_repositories
from megacoder.corpus.benchmarks import fingerprint
from megacoder.corpus.decontamination import DecontaminationConfig
from megacoder.corpus.engines import ClusterConfig
from megacoder.corpus.languages import CODE_LANGUAGES, LANGUAGES
from megacoder.corpus.licenses import check_names
from megacoder.corpus.near_config import NearDedupConfig
from megacoder.corpus.privacy import Handling, check_secrets_available
from megacoder.corpus.reading import Selection
from megacoder.corpus.rules import RuleThresholds
from megacoder.corpus.samples import SampleConfig
from megacoder.corpus.screening import ScreeningConfig
from megacoder.corpus.split import SplitConfig
from megacoder.corpus.tables import TableColumns

__all__ = ["CorpusConfig"]

FORMAT = 6  # incremented when the same inputs and configuration start to give a different output


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Repositories -> filtered, deduplicated, ordered documents."""

    out: Path
    """folder for the corpus"""
    input: tuple[Path, ...] = ()
    """repositories, archives, tables, or folders of these; without any, Python's library and packages here"""
    columns: TableColumns = field(default_factory=TableColumns)
    workers: int | None = None
    """number of processes; if unset, one per core, or as many as fit on a cluster. The output does not depend on it"""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    languages: tuple[str, ...] = ()
    """keep only these languages; without any, all 87 of the paper; Markdown and reStructuredText, natural language, are
    kept only where named"""
    max_file_bytes: int = 1 << 20
    """larger files are dropped unread"""
    max_repo_bytes: int | None = None
    """from a larger repository, folders are drawn at random up to this size (no limit for those in tables)"""
    fallback_encoding: str | None = None
    """encoding of text that is neither Unicode nor declares its own, such as latin-1; None drops such files"""
    allow_licenses: tuple[str, ...] = ()
    """keep only files under these licenses, by SPDX name (`none`: no license file, `unknown`: not recognized)"""
    drop_generated: bool = False
    """drop files whose first lines say that a program wrote them; the paper keeps them"""
    drop_minified: bool = False
    """drop minified code: `.min.js`, or JavaScript and CSS with next to no white space"""
    drop_vendored: bool = False
    """drop files in folders such as node_modules, vendor and third_party"""
    secrets: Handling = "keep"
    """keys, tokens and passwords: keep, redact (as <KEY>), or drop the file; needs `megacoder[secrets]`"""
    personal_data: Handling = "keep"
    """e-mail and public IP addresses: keep, redact, or drop the file"""
    ruleset: Literal["paper", "starcoder2"] = "paper"
    """file filters: DeepSeek-Coder's, or StarCoder2's"""
    rules: RuleThresholds = field(default_factory=RuleThresholds)
    exact_dedup: Literal["alone", "all", "none"] = "alone"
    """which files with the same text as an earlier one are dropped: those that no file of their repository depends on
    and that depend on none, so that repositories keep their order and samples (alone); all; or none, as in the paper,
    where only near-dedup removes copies"""
    near_dedup: NearDedupConfig = field(default_factory=NearDedupConfig)
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)
    benchmarks: tuple[Path, ...] = ()
    """benchmark tests as JSONL, JSON or Parquet; files that hold a piece of a test are dropped"""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    heldout: SplitConfig = field(default_factory=SplitConfig)
    seed: int = 0
    """seed of the random file order and of the folders drawn from a large repository"""
    shard_bytes: int = 16 << 20
    """repositories are grouped into shards up to this size; a larger one is a shard by itself"""

    def __post_init__(self) -> None:
        for name in self.languages:
            if name not in LANGUAGES:
                hint = did_you_mean(name, LANGUAGES, otherwise=f"; known are {', '.join(LANGUAGES)}")
                raise ConfigError(f"unknown language {name!r}{hint}")
        if self.columns.license is None:  # a table's own column may hold any names
            check_names(self.allow_licenses)
        check_at_least(self, 1, "max_file_bytes", "max_repo_bytes", "shard_bytes", "workers")
        if self.secrets != "keep":
            check_secrets_available()
        if self.fallback_encoding is not None:
            try:
                b"x".decode(self.fallback_encoding)
            except (LookupError, UnicodeError):
                raise ConfigError(f"fallback_encoding = {self.fallback_encoding!r}: no such encoding") from None

    @property
    def selection(self) -> Selection:
        """What is read of each repository, and how."""
        return Selection(
            languages=frozenset(self.languages) or CODE_LANGUAGES,
            max_file_bytes=self.max_file_bytes,
            max_repo_bytes=self.max_repo_bytes,
            fallback_encoding=self.fallback_encoding,
            seed=self.seed,
            exclude=self.out,
        )

    def identity(self) -> dict[str, Any]:
        """What decides the output, as plain values: all options but the output folder, the workers and the cluster.

        The parsers are part of it. Without the compiled recognizer, a few more files are screened out as broken; and
        Python files are judged by the Python that runs: 3.11 refuses what 3.12 added, and 3.14 takes `except A, b:`.
        """
        plain = {name: value for name, value in to_dict(self).items() if name not in ("out", "workers", "cluster")}
        inputs = sorted(
            {os.fsencode(os.path.realpath(folder)).decode("utf-8", "backslashreplace") for folder in self.input}
        )
        chosen: dict[str, Any] = {
            "languages": sorted(set(self.languages)),
            "allow_licenses": sorted(set(self.allow_licenses)),
        }
        if self.heldout.like is not None:
            chosen["heldout"] = {**plain["heldout"], "like": sorted(heldout_repositories(self.heldout.like))}
        chosen["benchmarks"] = [f"{path.name} {fingerprint(path)}" for path in self.benchmarks]
        parsers = {"recognizer": hasattr(native(), "Recognizer"), "python": ".".join(map(str, sys.version_info[:2]))}
        return plain | {"input": inputs, **chosen, "format": FORMAT, **parsers}
