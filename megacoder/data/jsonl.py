"""JSONL files, plain or compressed (.gz, .zst), row by row: the one reader of all that this library takes as JSONL.

Memory holds one line at a time, and at most `MAX_LINE_BYTES` of it: a few kilobytes of a compressed file can expand to
a line of gigabytes. What is wrong with a line is told as text, so that a caller can refuse, skip or count such rows; a
file that cannot be read, or that ends early, is a FormatError that names it.
"""

import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megacoder.core.errors import FormatError

__all__ = ["EMPTY_LINE", "MAX_LINE_BYTES", "JsonRows", "decompressed"]

MAX_LINE_BYTES = 1 << 28
EMPTY_LINE = "an empty line"

_CODECS = {".gz": "gzip", ".zst": "zstd"}


class JsonRows:
    """Iterates over (line number from 1, its bytes, the row or what is wrong with the line)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fraction = 0.0
        """how much of the file has been read"""

    def __iter__(self) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
        """Raises FormatError for a file that cannot be read."""
        try:
            size = max(self.path.stat().st_size, 1)
            with self.path.open("rb") as raw, decompressed(self.path, raw) as lines:
                for number in itertools.count(1):
                    line = lines.readline(MAX_LINE_BYTES + 1)
                    if not line:
                        break
                    length = len(line)
                    if length > MAX_LINE_BYTES:
                        while line and not line.endswith(b"\n"):
                            line = lines.readline(MAX_LINE_BYTES)
                            length += len(line)
                    self.fraction = raw.tell() / size
                    yield number, length, f"over {MAX_LINE_BYTES} bytes" if length > MAX_LINE_BYTES else _parsed(line)
        except OSError as error:
            told = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise FormatError(f"{self.path}: not readable: {told}") from None


@contextmanager
def decompressed(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    """What `raw`, the open file `path`, holds; decompressed if its name says that it is compressed.

    Reading raises OSError where it is not compressed as its name says.
    """
    codec = _CODECS.get(path.suffix.lower())
    if codec is None:
        yield raw
        return
    import pyarrow as pa  # only here: most files are plain, and must be read at once

    try:
        yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), codec))
    except pa.ArrowException as error:
        raise OSError(str(error)) from None


def _parsed(line: bytes) -> dict[str, Any] | str:
    if not line.strip():
        return EMPTY_LINE
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {line[error.start]:#04x} at {error.start})"
    except json.JSONDecodeError as error:
        return f"malformed JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except ValueError as error:  # such as a number of thousands of digits
        return f"malformed JSON: {error}"
    except RecursionError:
        return "malformed JSON: nested too deeply"
    return row if isinstance(row, dict) else f"expected a JSON object, not {type(row).__name__}"
