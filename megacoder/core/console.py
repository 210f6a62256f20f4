"""What a person sees while long work runs: a rich progress bar on a terminal, plain lines elsewhere.

One interface for every command, so that a log file never holds cursor codes and a terminal never scrolls away.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # rich takes longer to import than some commands to run: only those that draw import it
    from rich.progress import Progress, TaskID

__all__ = ["ProgressBar", "counted", "progress", "say", "say_once", "table"]


class ProgressBar(Protocol):
    """Handed out by `progress`."""

    def update(self, completed: float, note: str = "") -> None:
        """Moves to `completed` units; `note` is shown behind the bar."""


@contextmanager
def progress(title: str, total: float, *, start: int = 0, quiet: bool = False) -> Iterator[ProgressBar]:
    """A progress bar over `total` units, `start` of them done already, with elapsed and remaining time.

    Off a terminal it prints a line every ten seconds and one at the end; `quiet` prints nothing (ranks other
    than the first).
    """
    if quiet or sys.stderr is None:
        yield _Silent()
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        bars = Progress(*columns, console=Console(stderr=True))
        with suppress(OSError):
            bars.start()
        try:
            yield _Bar(bars, bars.add_task(title, total=total, completed=start, note=""))
        finally:
            with suppress(OSError):  # the terminal has been closed: see `say`
                bars.stop()
    else:
        lines = _Lines(title, total, start)
        yield lines
        lines.finish()


def say(text: str) -> None:
    """A line for the person who started the command, on stderr so that stdout stays for results.

    In one write: a line break that is written by itself may come after the text of another rank. Writing to a terminal
    that has been closed fails, which must not keep a run from its checkpoint.
    """
    if sys.stderr is None:  # closed by our parent
        return
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def say_once(text: str) -> None:
    """`say`, but only on the first rank of a machine: for what all its ranks would say."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(text)


def counted(number: int, one: str, more: str) -> str:
    """`number` with its noun, in the singular for 1."""
    return f"{number:,} {one if number == 1 else more}"


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table on stdout; the first column left-aligned, the rest right-aligned.

    On a terminal too narrow for it, where words and numbers would be cut, each row becomes a line of named values.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
    if Measurement.get(console, console.options.update(width=1 << 16), drawn).minimum > console.width:
        named = ("  ".join(f"{column} {cell}" for column, cell in zip(columns, row, strict=True)) for row in rows)
        console.print("\n".join([title, *(f"- {line}" for line in named)]), markup=False, highlight=False)
        return
    console.print(drawn)


class _Silent:
    def update(self, completed: float, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bars: "Progress", task: "TaskID") -> None:
        self.bars, self.task = bars, task

    def update(self, completed: float, note: str = "") -> None:
        self.bars.update(self.task, completed=completed, note=note)


class _Lines:
    def __init__(self, title: str, total: float, done_before: int) -> None:
        self.title, self.total, self.done_before = title, total, done_before
        self.start = self.last = time.monotonic()
        self.completed, self.note, self.printed = float(done_before), "", -1.0

    def update(self, completed: float, note: str = "") -> None:
        self.completed, self.note = completed, note
        if time.monotonic() - self.last >= 10.0:
            self._print()

    def finish(self) -> None:
        if self.completed != self.printed:
            self._print()

    def _print(self) -> None:
        self.last, self.printed = time.monotonic(), self.completed
        share = self.completed / self.total if self.total else 1.0
        elapsed, done = self.last - self.start, self.completed - self.done_before
        left = f", {elapsed / done * (self.total - self.completed):.0f} s left" if done else ""
        say(f"{self.title}: {share:4.0%}  {elapsed:.0f} s{left}  {self.note}".rstrip())
