"""Runs megacoder's command line in this process and returns what a user sees; waits for processes of their own."""

import time

from megacoder.cli.main import main

__all__ = ["refusal", "run_command", "wait_until"]


def run_command(capsys, *words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of these words alone."""
    capsys.readouterr()
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def refusal(capsys, *words, code: int = 1) -> str:
    """The one line in which a command says why it ends with that exit code."""
    found, _, said = run_command(capsys, *words)
    assert (found, said.count("\n")) == (code, 1), said
    return said


def wait_until(holds, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
