"""The held-out part: whole repositories, so that no file of a held-out project is trained on.

Names are drawn in the order of a keyed hash, so the choice depends on neither input order nor workers. A draw that
would exceed the target is skipped, and draws of at most a quarter of the target go first: one large repository never
becomes the whole held-out set while smaller ones can share it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError

__all__ = ["SplitConfig", "choose_heldout"]


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How much is held out."""

    fraction: float = 0.05
    """share of the bytes, up to max_bytes; 0 holds nothing out"""
    max_bytes: int = 30_000_000
    """most that is held out, in bytes, however large the corpus; 30 MB are some ten million tokens"""
    seed: int = 0
    """a different seed holds out different repositories"""
    like: Path | None = None
    """another corpus of these repositories: what it holds out is held out here, too, and nothing else"""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"heldout.fraction = {self.fraction}: must be at least 0 and below 1")
        check_at_least(self, 1, "max_bytes", prefix="heldout.")


def choose_heldout(sizes: Mapping[str, int], config: SplitConfig) -> frozenset[str]:
    """Which of the units `sizes` (name -> bytes) to hold out.

    The bytes held out come close to the target from below. Where even the smallest unit exceeds it, that one is held
    out: of two or more units at least one is held out and at least one is left, unless the fraction is 0.
    """
    if config.fraction == 0 or len(sizes) < 2:
        return frozenset()
    room = target = min(config.fraction * sum(sizes.values()), config.max_bytes)
    drawn = sorted(sizes, key=lambda name: hashlib.sha256(f"{config.seed}:{name}".encode()).digest())
    chosen: set[str] = set()
    for largest in (target / 4, target):
        for name in drawn:
            if name not in chosen and sizes[name] <= min(largest, room):
                chosen.add(name)
                room -= sizes[name]
    return frozenset(chosen or {min(drawn, key=lambda name: sizes[name])})
