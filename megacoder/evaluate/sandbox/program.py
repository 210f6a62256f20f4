"""What goes into the sandbox and what comes out: files, steps with limits, and how the last step that ran ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["PRELOADED_PYTHON", "Limits", "Outcome", "Program", "Step", "Verdict", "as_message"]

PRELOADED_PYTHON = "<python>"
"""First word of a step that runs a Python file in a fork of the worker, with its modules imported: ten times faster."""

Verdict = Literal[
    "passed",  # exit code 0; a preloaded Python program also ran to its end
    "failed",  # another exit code, an assertion, an exception, a complaint on stderr, or any output where none may be
    "ended early",  # a preloaded Python program exited with 0 before its end, where the tests are
    "crashed",  # a signal that it caused itself
    "time",  # more CPU time or wall time than allowed
    "memory",
    "processes",
    "disk",
    "output",
]
"""How a step ended."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one step may use; beyond that it is killed, and the verdict says why."""

    seconds: float = 10.0
    """CPU time of all its processes together, which does not depend on what else runs; wall time may be twice that plus
    a second"""
    memory_mb: int = 2048
    """resident memory of all its processes and files together"""
    processes: int = 64
    """processes and threads at a time"""
    disk_mb: int = 64
    """limit of all files together, and of each"""
    output_kb: int = 1024
    """stdout and stderr together"""
    address_space: bool = True
    """whether address space is limited too, to little more than `memory_mb`; off for runtimes that reserve much"""

    @property
    def wall_seconds(self) -> float:
        """The limit for a program that sleeps."""
        return 2 * self.seconds + 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, run in the folder that holds the program's files."""

    argv: tuple[str, ...]
    """first word: a path, a name to be found in PATH, or PRELOADED_PYTHON followed by a file's name"""
    limits: Limits = field(default_factory=Limits)
    complaint: str = ""
    """pattern of a line on stderr that makes a step with exit code 0 fail; none if empty"""
    silent: bool = False
    """whether anything printed makes a step with exit code 0 fail"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Files and what to do with them; a step runs if those before it passed."""

    files: Mapping[str, str]
    """relative path -> text"""
    steps: tuple[Step, ...]
    """the last one runs the program, those before compile it"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """added to PATH, HOME and what every program gets"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the last step that ran ended."""

    verdict: Verdict
    step: int
    """its index; before the last one, the program does not compile"""
    exit_code: int | None
    """None where a signal ended it"""
    signal: int | None
    stdout: str
    stderr: str
    """the first 16 KiB of each"""
    cpu_seconds: float
    wall_seconds: float
    peak_mb: float
    """the most memory seen, processes and files"""
    alone: bool = False
    """whether this is the second try, with nothing else running"""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    def describe(self) -> str:
        """A line for a person: the verdict, and what the program said last."""
        detail = f"signal {self.signal}" if self.verdict == "crashed" else ""
        if self.verdict == "failed":
            lines = self.stderr.strip().splitlines() or self.stdout.strip().splitlines()
            detail = lines[-1][:200] if lines else f"exit code {self.exit_code}"
        return f"{self.verdict}: {detail}" if detail else self.verdict


def as_message(program: Program, *, alone: bool) -> dict[str, Any]:
    """`program` in JSON's types, for a worker; `alone` doubles the wall time, of which a busy machine takes some."""
    patience = 2 if alone else 1
    steps = [
        {
            "argv": step.argv,
            "limits": vars(step.limits),
            "wall": patience * step.limits.wall_seconds,
            "complaint": step.complaint,
            "silent": step.silent,
        }
        for step in program.steps
    ]
    return {"files": dict(program.files), "steps": steps, "environment": dict(program.environment)}
