"""Scores of a run's checkpoints, as `megacoder eval NAME --follow` measures them beside the run.

In the run's folder, `scores/NAME/scores.jsonl` has a line per checkpoint, and `tensorboard/NAME` the same numbers: in
a folder of its own, since TensorBoard reads no file of a folder any more once a newer one has begun there. A run that
goes back to an older checkpoint comes to steps that have a line already; what is scored then replaces that line and
those of all later steps, which no longer are of this run.
"""

import json
import os
from pathlib import Path
from typing import Any

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
        self._board = run / TENSORBOARD / name
        path = _path(run, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self.rows = _read(run, name)
        self._lines = Appender(path)
        self._events: EventsFile | None = None

    def add(self, row: Row) -> str:
        """Writes a line, which it returns, and the scores for TensorBoard as NAME/SCORE."""
        step, name, scores = row["step"], row["name"], row["scores"]
        line = json.dumps(row | {"scores": finite(scores)})
        self._lines.append(f"{line}\n".encode())
        if self._events is None or step in self.rows:
            self._close_events()
            self._events = EventsFile(self._board, first_step=step)
        self._events.write(step, {f"{name}/{score}": value for score, value in scores.items()})
        _put(self.rows, row)
        return line

    def close(self) -> None:
        """Closes both files."""
        self._lines.close()
        self._close_events()

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()


def _path(run: Path, name: str) -> Path:
    return scores_folder(run, name) / f"{SCORES}.jsonl"


def _read(run: Path, name: str) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    for row in read_metrics(_path(run, name)):
        if isinstance(row.get("scores"), dict):
            _put(rows, row)
    return dict(sorted(rows.items()))


def _put(rows: dict[int, Row], row: Row) -> None:
    """Adds a line to those by step."""
    if row["step"] in rows:
        for step in [step for step in rows if step >= row["step"]]:
            del rows[step]
    rows[row["step"]] = row
