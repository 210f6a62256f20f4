"""Scores of a run's checkpoints, as `megacoder eval NAME --follow` measures them beside the run.

In the run's folder, `scores/NAME/scores.jsonl` has a line per checkpoint, and `tensorboard/NAME` the same numbers: in
a folder of its own, since TensorBoard reads no file of a folder any more once a newer one has begun there.

A run that goes back to an older checkpoint leaves lines that are of it no more. They are found when a checkpoint is
scored that is not later than all lines: of those, the newest whose checkpoint is still in the run unchanged is of this
run, since a run goes on from its newest checkpoint, and so are those before it; what is later is dropped from both
files. Where all their checkpoints are gone (`checkpoint.keep_last`), the lines of earlier steps stay.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacoder.core.console import say
from megacoder.core.files import replacing
from megacoder.train.metrics_log import TENSORBOARD, Appender, EventsFile, finite, read_metrics

__all__ = ["ScoreLog", "read_scores", "scores_folder"]

SCORES = "scores"
"""Folder in a run's folder; in it a folder for each name, with scores.jsonl."""

Row = dict[str, Any]
"""`step`, `tokens` (trained on until then), `name`, `scores` (a number by each name), `protocol`, `checkpoint`."""


def scores_folder(run: Path, name: str) -> Path:
    """Where the scores of that name are."""
    return run / SCORES / name


def read_scores(run: Path) -> dict[str, list[Row]]:
    """Lines by the name of what was measured, in order of step; a line that is damaged is named and left out."""
    found = sorted(path.parent.name for path in (run / SCORES).glob(f"*/{SCORES}.jsonl"))
    rows = {name: _read(run, name) for name in found}
    return {name: list(there.values()) for name, there in rows.items() if there}


class ScoreLog:
    """Adds lines to a run's scores of one name; for the one process that has locked their folder."""

    def __init__(self, run: Path, name: str) -> None:
        """Drops a last line that was cut off, as by a crash."""
        self._name, self._board, self._path = name, run / TENSORBOARD / name, _path(run, name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
        self.rows = _read(run, name)
        self._lines = Appender(self._path)
        self._events: EventsFile | None = None
        self._drawn = -1

    def add(self, row: Row, *, saved: Mapping[int, str]) -> str:
        """Writes a line, which it returns, and the scores for TensorBoard as NAME/SCORE.

        `saved` are the checkpoints in the run by step, as in `checkpoint` of a row.
        """
        row = row | {"scores": finite(row["scores"])}
        kept = _of_this_run(self.rows, row["step"], saved)
        dropped, self.rows = self.rows.keys() - kept.keys(), dict(sorted({**kept, row["step"]: row}.items()))
        self._draw(min(dropped | {row["step"]}))  # first: what is cut short in between is scored and drawn again
        self._write(row, anew=bool(dropped))
        return json.dumps(row)

    def close(self) -> None:
        """Closes both files."""
        self._lines.close()
        self._close_events()

    def _write(self, row: Row, *, anew: bool) -> None:
        if anew:
            self._lines.close()
            with replacing(self._path) as temporary:
                temporary.write_bytes(b"".join(map(_line, self.rows.values())))
            self._lines = Appender(self._path)
        else:
            self._lines.append(_line(row))

    def _draw(self, first: int) -> None:
        """Brings TensorBoard's curves up to date from step `first` on; a file of its own only grows in order."""
        later = [row for step, row in self.rows.items() if step >= first]
        if self._events is None or first <= self._drawn:
            self._close_events()
            self._events = EventsFile(self._board, first_step=first)
        for row in later:
            scores = {f"{self._name}/{key}": value for key, value in row["scores"].items() if value is not None}
            self._events.write(row["step"], scores)
        self._drawn = later[-1]["step"]

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()


def _path(run: Path, name: str) -> Path:
    return scores_folder(run, name) / f"{SCORES}.jsonl"


def _line(row: Row) -> bytes:
    return f"{json.dumps(row)}\n".encode()


def _read(run: Path, name: str) -> dict[int, Row]:
    """Rows by step, in order of it."""
    rows: dict[int, Row] = {}
    for row in read_metrics(path := _path(run, name)):
        if _are_scores(row.get("scores")):
            rows[row["step"]] = row
        else:
            say(f"{path}: the line of step {row['step']} has no scores that are numbers; it is left out")
    return dict(sorted(rows.items()))


def _are_scores(found: Any) -> bool:
    """Whether it maps names to numbers, or null where one was not finite."""
    return isinstance(found, dict) and all(
        value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)
        for value in found.values()
    )


def _of_this_run(rows: Mapping[int, Row], step: int, saved: Mapping[int, str]) -> dict[int, Row]:
    """The `rows` that stay when `step` is scored, with the `saved` checkpoints there: see the module's first lines."""
    if all(scored < step for scored in rows):
        return dict(rows)
    others = {scored: row for scored, row in rows.items() if scored != step}
    unchanged = [scored for scored, row in others.items() if scored in saved and saved[scored] == row.get("checkpoint")]
    last = max(unchanged, default=step - 1)
    return {scored: row for scored, row in others.items() if scored <= last}
