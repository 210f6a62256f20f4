"""Files of a corpus's input, and what a build left behind."""

from pathlib import Path

import pyarrow.parquet as pq


def write(path: Path, content: str | bytes = "x = 1\n") -> None:
    """With the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read_tree(out: Path) -> dict[str, bytes]:
    """All files below `out`."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def read_rows(out: Path, part: str = "train") -> list[dict]:
    """Of a built corpus, in order."""
    return [row for path in sorted((out / part).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
