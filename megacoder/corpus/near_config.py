"""The options of near-dedup."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError
from megacoder.corpus.minhash import HASH_MULTIPLE

__all__ = ["NearDedupConfig"]


@dataclass(frozen=True, kw_only=True)
class NearDedupConfig:
    """How near copies are found. The paper publishes none of these; 5-grams and 0.7 are StarCoder2's."""

    level: Annotated[Literal["repository", "file", "both", "none"], tyro.conf.arg(aliases=["--near-dedup"])] = (
        "repository"
    )
    """what is compared: whole repositories (the paper), files, both (repositories first), or nothing"""
    similarity: float = 0.7
    """estimated Jaccard similarity at or above which two are near copies"""
    ngram: int = 5
    """words per shingle"""
    num_hashes: int = 256
    """hashes per signature; the standard error of the estimate is at most 0.5 / sqrt(num_hashes)"""
    bands: int = 42
    """bands per signature; two that agree in any band are candidates"""
    rows: int = 6
    """hashes per band; with 42 bands of 6, one pair in 300,000 at a similarity of 0.8 is missed"""
    min_words: int = 20
    """repositories or files with fewer words have no near copies"""

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise ConfigError(f"near_dedup.similarity = {self.similarity}: must be above 0 and at most 1")
        check_at_least(self, 1, "ngram", "num_hashes", "bands", "rows", "min_words", prefix="near_dedup.")
        if self.num_hashes % HASH_MULTIPLE:
            raise ConfigError(f"near_dedup.num_hashes = {self.num_hashes}: must be a multiple of {HASH_MULTIPLE}")
        if self.bands * self.rows > self.num_hashes:
            raise ConfigError(
                f"near_dedup.bands x rows = {self.bands} x {self.rows}: there are only {self.num_hashes} hashes; lower "
                "either, or raise num_hashes"
            )
