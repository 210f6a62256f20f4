"""Runs megacoder's command line in this process and returns what a user sees."""

from megacoder.cli.main import main

__all__ = ["run_command"]


def run_command(capsys, *words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()
