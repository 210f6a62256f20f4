"""Locality-sensitive hashing of MinHash signatures: which pairs of units are worth comparing, and which are near.

A signature is cut into bands of `rows` places; two units that agree in any band are candidates, which happens with
probability 1 - (1 - J^rows)^bands for a similarity of J. A candidate counts only if the complete signatures agree in
the required share of places: bands alone let through pairs far below it.

A band's records are stored in sorted runs (`runs.py`). In a group of equal bands each unit is paired with the `WINDOW`
units before it and with the group's first. Larger groups are rare except for boilerplate; for them the search is
repeated without the near copies found so far, until it finds no more (`near_dedup.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacoder.corpus.runs import read_range

__all__ = ["EDGE", "SignatureFiles", "band_runs", "candidate_pairs", "near_pairs"]

RECORD = np.dtype([("key", "<u8"), ("unit", "<u4")])
"""A band's hash, and the unit within its shard."""
EDGE = np.dtype([("later", "<i8"), ("earlier", "<i8"), ("similarity", "<f4")])
"""Two near units by their global numbers, and the share of equal places."""

WINDOW = 32
_PAIRS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class SignatureFiles:
    """The signatures of all units, shard after shard, in raw files that stay on disk."""

    paths: tuple[Path, ...]
    """each (units, num_hashes) uint32"""
    counts: tuple[int, ...]
    """number of units in each"""
    num_hashes: int

    @property
    def starts(self) -> np.ndarray:
        """The global number of each shard's first unit, then the number of all units."""
        return np.cumsum([0, *self.counts])

    def shard(self, index: int) -> np.ndarray:
        """The signatures of one shard, (units, num_hashes) uint32, mapped from disk."""
        shape = (self.counts[index], self.num_hashes)
        return np.memmap(self.paths[index], np.uint32, "r", shape=shape) if shape[0] else np.zeros(shape, np.uint32)

    def take(self, units: np.ndarray) -> np.ndarray:
        """The signatures of some units by global number, (N, num_hashes) uint32."""
        starts = self.starts
        shard_of = np.searchsorted(starts, units, "right") - 1
        out = np.empty((len(units), self.num_hashes), np.uint32)
        for shard in np.unique(shard_of):
            chosen = shard_of == shard
            out[chosen] = self.shard(shard)[units[chosen] - starts[shard]]
        return out


def band_runs(signatures: np.ndarray, units: np.ndarray, *, bands: int, rows: int) -> Iterator[np.ndarray]:
    """The records of each band for `units`, given all signatures (N, K) uint32 of a shard."""
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    for band in range(bands):
        keys = np.full(len(units), band, np.uint64)
        for place in range(band * rows, (band + 1) * rows):
            keys = (keys ^ signatures[units, place]) * multiplier
            keys ^= keys >> np.uint64(32)
        run = np.empty(len(units), RECORD)
        run["key"], run["unit"] = keys, units
        yield run


def candidate_pairs(
    band_files: Sequence[Path], starts: np.ndarray, keys: tuple[int, int], *, band: int, bands: int, gone: np.ndarray
) -> tuple[np.ndarray, bool]:
    """(pairs, whether a group was too large for all of its pairs); pairs (N, 2) int64, the earlier unit first.

    Only bands with a hash in the range `keys`; units in `gone`, ascending, are skipped.
    """
    parts = [read_range(path, RECORD, keys, run=band, num_runs=bands) for path in band_files]
    hashes = np.concatenate([np.zeros(0, np.uint64), *(part["key"] for part in parts)])
    units = np.concatenate(
        [np.zeros(0, np.int64), *(part["unit"] + start for part, start in zip(parts, starts, strict=False))]
    )
    if len(gone):
        alive = gone[np.minimum(np.searchsorted(gone, units), len(gone) - 1)] != units
        hashes, units = hashes[alive], units[alive]
    order = np.lexsort((units, hashes))
    hashes, units = hashes[order], units[order]
    firsts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else order
    first_of = np.repeat(firsts, np.diff([*firsts, len(hashes)]))
    place_in_group = np.arange(len(hashes)) - first_of
    pairs = []
    for distance in range(1, min(WINDOW, place_in_group.max(initial=0)) + 1):
        later = np.flatnonzero(place_in_group >= distance)
        pairs.append(np.stack([units[later - distance], units[later]], axis=1))
    far = np.flatnonzero(place_in_group > WINDOW)
    pairs.append(np.stack([units[first_of[far]], units[far]], axis=1))
    return np.concatenate(pairs), bool(len(far))


def near_pairs(pairs: np.ndarray, signatures: SignatureFiles, *, similarity: float) -> np.ndarray:
    """The candidate pairs that agree in at least the share `similarity` of all places, as EDGE records."""
    edges = []
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        units, positions = np.unique(part, return_inverse=True)  # sorted, so that files are read forwards
        taken = signatures.take(units)
        left, right = positions.reshape(part.shape).T
        agree = (taken[left] == taken[right]).mean(axis=1, dtype=np.float32)
        near = agree >= similarity
        found = np.empty(near.sum(), EDGE)
        found["earlier"], found["later"] = part[near].T
        found["similarity"] = agree[near]
        edges.append(found)
    return np.concatenate([np.zeros(0, EDGE), *edges])
