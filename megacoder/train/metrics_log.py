"""What a run writes down: one JSON object per line, and the same numbers for TensorBoard.

Only the first rank writes. On resume, lines past the checkpoint's step are dropped first, so that the file holds every
step once; wall-clock fields aside, two runs of one seed write the same lines.
"""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megacoder.core.errors import FormatError
from megacoder.core.files import write_text

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends to `folder`/metrics.jsonl and `folder`/tensorboard."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; numbers also go to TensorBoard under their names."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._lines.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is no file; a last line cut off by a crash is left out.

    Raises FormatError with the number of any other line that is not one of ours.
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
                f"{path}:{number}: not a line of metrics; move the file away to go on without it"
            ) from None
    return rows
