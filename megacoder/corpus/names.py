"""Names of files or repositories by global number: looked up on disk, so that no process holds them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megacoder.core.files import replacing
from megacoder.corpus.shards import disk_errors

__all__ = ["NameFiles", "write_names"]


def write_names(path: Path, names: Sequence[str] | pa.ChunkedArray) -> None:
    """Writes the names to a file that can be memory-mapped."""
    column = names.cast(pa.large_string()) if isinstance(names, pa.ChunkedArray) else pa.array(names, pa.large_string())
    table = pa.table({"name": column})
    with disk_errors(path), replacing(path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
        writer.write_table(table)


@dataclass(frozen=True, kw_only=True)
class NameFiles:
    """One file of `write_names` for each shard."""

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    """names in each"""

    @property
    def starts(self) -> np.ndarray:
        """The global number of each shard's first name, then the number of all names."""
        return np.cumsum([0, *self.counts])

    def take(self, numbers: np.ndarray) -> list[str]:
        """The names of `numbers`, (N,) int64, in that order; every file is opened once at most."""
        starts = self.starts
        shard_of = np.searchsorted(starts, numbers, "right") - 1
        found = [""] * len(numbers)
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            with pa.memory_map(str(self.paths[shard])) as file:
                names = pa.ipc.open_file(file).read_all()["name"].take(pa.array(numbers[places] - starts[shard]))
                for place, name in zip(places.tolist(), names.to_pylist(), strict=True):
                    found[place] = name
        return found
