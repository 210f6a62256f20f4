"""A real compiler's verdict, an option where one is installed: only compilers that check syntax and run nothing.

`perl -c` is not among them since it runs BEGIN blocks, nor are compilers that would need the headers or packages that a
file imports. The text goes in through stdin; nothing is written.
"""

import functools
import shutil
import subprocess

__all__ = ["COMPILERS", "accepts"]

COMPILERS = {
    "Go": ("gofmt", "-e"),
    "JavaScript": ("node", "--check", "-"),
    "Lua": ("luac", "-p", "-"),
    "PHP": ("php", "-n", "-l"),
    "Ruby": ("ruby", "-c", "-"),
    "Shell": ("bash", "-n"),
}
"""Commands that exit with 0 if they accept the text on stdin."""

_SECONDS = 20


def accepts(text: str, language: str) -> bool | None:
    """Whether the language's compiler accepts the text; None if none is installed, or if it times out."""
    command = COMPILERS.get(language)
    if command is None or not _installed(command[0]):
        return None
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode == 0


@functools.cache
def _installed(name: str) -> bool:
    return shutil.which(name) is not None
