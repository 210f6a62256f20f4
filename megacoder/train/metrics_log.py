"""A run's metrics: one JSON object per line, and the same numbers for TensorBoard.

Only the first rank writes. On resume, lines past the checkpoint's step are dropped first, so that the file holds every
step once; wall-clock fields aside, two runs of one seed write the same lines.

Neither file can end a run: what does not fit on a full disk is held back, and written when there is room again. Both
are written at once, with no thread in between that could fail unnoticed.
"""

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megacoder.core.console import say
from megacoder.core.errors import FormatError
from megacoder.core.files import write_text

__all__ = ["HELD_OUT_LOSS", "METRICS", "MetricsLog", "read_metrics"]

METRICS = "metrics.jsonl"
"""In a run's folder."""
HELD_OUT_LOSS = "held_out_loss"
"""In the lines of steps after which it was measured."""


class MetricsLog:
    """Appends to `folder`/metrics.jsonl and `folder`/tensorboard."""

    def __init__(self, folder: Path, *, resume_step: int, amend: dict[str, float] | None = None) -> None:
        """`amend` is added to the last line, that of `resume_step`: what an interruption had left to be measured."""
        board = folder / "tensorboard"
        board.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        if amend:
            kept[-1] |= _plain(amend)
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._lines = _Appender(path)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._events = _Appender(board / name)
        self._record(Event(file_version="brain.Event:2"))
        # TensorBoard drops what earlier files have from this step on.
        self._record(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))
        if amend:
            self._record_values(resume_step, amend)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, with null for what is not finite, which JSON lacks; TensorBoard gets the numbers by their names."""
        self._lines.append((json.dumps({"step": step, **_plain(values)}) + "\n").encode())
        self._record_values(step, values)

    def close(self) -> None:
        """Closes both files; reports lines that were lost."""
        for appender in (self._lines, self._events):
            appender.close()

    def _record_values(self, step: int, values: dict[str, float]) -> None:
        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._record(Event(step=step, summary=Summary(value=entries)))

    def _record(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self._events).write(event.SerializeToString())


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class _Appender:
    """A file that grows by whole pieces or not at all; enough of a file object for RecordWriter."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._held: list[bytes] = []

    def append(self, piece: bytes) -> None:
        """Writes `piece` after what was held back; if not all of that fits, holds all of it back."""
        self._held.append(piece)
        try:
            whole = b"".join(self._held)
            if self._file.write(whole) != len(whole):
                raise OSError
        except OSError as error:
            self._file.truncate(self._size)  # drops the part that fitted
            if len(self._held) == 1:
                say(f"{self._path}: {error.strerror or 'no room'}; entries are held back until they fit")
            return
        self._size += len(whole)
        self._held.clear()

    write = append

    def close(self) -> None:
        """Tries once more to write what is held back."""
        if self._held:
            self.append(b"")
        if self._held:
            say(f"{self._path}: the last {len(self._held) - 1:,} entries did not fit and are lost")
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is no file; a last line cut off by a crash is skipped.

    Raises FormatError with the number of any other line that is not a line of metrics.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut off
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            raise FormatError(
                f"{path}:{number}: not a line of metrics; move the file away to continue without it"
            ) from None
    return rows
