"""A run's metrics: one JSON object per line, and the same numbers for TensorBoard.

Only the first rank writes. On resume, lines past the checkpoint's step are dropped first, so that the file holds every
step once; wall-clock fields aside, two runs of one seed write the same lines. A line that cannot be read, as after a
fault of the disk, is no reason to stop a run: it is named, left where it is, and left out of what is read.

Neither file can end a run: what does not fit on a full disk is held back, and written when there is room again. Both
are written at once, with no thread in between that could fail unnoticed.
"""

import contextlib
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from megacoder.core.console import counted, say
from megacoder.core.files import replacing

__all__ = [
    "DEVICE_TFLOPS", "HELD_OUT_LOSS", "METRICS", "MFU", "TENSORBOARD", "Appender", "EventsFile", "MetricsLog",
    "finite", "read_metrics",
]  # fmt: skip

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
"""File and folder in a run's folder."""
HELD_OUT_LOSS = "held_out_loss"
"""In the lines of steps after which it was measured."""
DEVICE_TFLOPS, MFU = "tflops_per_device", "mfu"
"""With a slash and the convention's name; MFU only where the device's peak is known. Older versions wrote `tflops`, of
all devices together, with causal attention."""


class MetricsLog:
    """Appends to `folder`/metrics.jsonl and `folder`/tensorboard."""

    def __init__(self, folder: Path, *, resume_step: int, amend: dict[str, float] | None = None) -> None:
        """`amend` is added to the last line, that of `resume_step`: what an interruption had left to be measured."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        kept = [line for line in _read(path) if line.row is None or line.row["step"] <= resume_step]
        _name_damage(path, kept)
        if amend:
            last, row = next((n, row) for n, line in reversed([*enumerate(kept)]) if (row := line.row) is not None)
            kept[last] = _Line(json.dumps(row | finite(amend)).encode())
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(line.text + b"\n" for line in kept))
        self._lines = Appender(path)
        self._events = EventsFile(folder / TENSORBOARD, first_step=resume_step + 1)
        if amend:
            self._events.write(resume_step, amend)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, with null for what is not finite, which JSON lacks; TensorBoard gets the numbers by their names."""
        self._lines.append((json.dumps({"step": step, **finite(values)}) + "\n").encode())
        self._events.write(step, values)

    def close(self) -> None:
        """Closes both files; reports lines that were lost."""
        for file in (self._lines, self._events):
            file.close()


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """With null for what is not finite, which JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Appender:
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


class EventsFile:
    """A new file of TensorBoard's in `folder`, which drops what earlier files there have from `first_step` on.

    Its modules take a fifth of a second to import, and only a process that logs needs them.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appender(folder / name)
        self._record(Event(file_version="brain.Event:2"))
        self._record(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Each value by its name."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._record(Event(step=step, summary=Summary(value=entries)))

    def _record(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()
        RecordWriter(self._file).write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, *, quiet: bool = False) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is no file; a last line cut off by a crash is skipped.

    So is any other line that is not a line of metrics; the first of them is named, unless `quiet`.
    """
    lines = _read(path)
    if not quiet:
        _name_damage(path, lines)
    return [line.row for line in lines if line.row is not None]


class _Line:
    """A line of a metrics file; `row` is None where it is not a line of metrics."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.row: dict[str, Any] | None = None
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(text)
            self.row = row | {"step": int(row["step"])}


def _read(path: Path) -> list[_Line]:
    if not path.exists():
        return []
    return [_Line(text) for text in path.read_bytes().split(b"\n")[:-1]]  # what follows the last one was cut off


def _name_damage(path: Path, lines: list[_Line]) -> None:
    damaged = [number for number, line in enumerate(lines, start=1) if line.row is None]
    if damaged:
        more = f", nor {counted(len(damaged) - 1, 'more line', 'more lines')}" if len(damaged) > 1 else ""
        say(f"{path}:{damaged[0]}: not a line of metrics{more}; it stays there, and its step is left out")
