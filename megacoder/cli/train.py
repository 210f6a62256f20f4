"""`megacoder train RUN.toml`: pre-training, alone, under torchrun, or (with --nproc) starting torchrun itself."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacoder.core.config import load_toml, parse_args, to_toml
from megacoder.core.errors import ConfigError
from megacoder.train.config import RunConfig

__all__ = ["RunWords", "main", "read_run", "take_nproc"]

PROG = "megacoder train RUN.toml [--nproc N] [--print-config]"


@dataclass(frozen=True, kw_only=True)
class RunWords:
    """A command line that names a run."""

    path: Path
    """its TOML file"""
    overrides: list[str]
    """dotted settings after it"""
    config: RunConfig
    """the two together"""
    nproc: int | None
    flags: frozenset[str]
    """the command's own flags that were given"""


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then dotted overrides such as `--schedule.peak-lr 3e-4`."""
    run = read_run(argv, prog=PROG, flags=("--print-config",))
    config = run.config
    if config.data.conversations.train:
        raise ConfigError(f"{run.path} trains on conversations; use megacoder sft {run.path}")
    if run.flags:
        print(to_toml(config), end="")
    elif run.nproc is None or "WORLD_SIZE" in os.environ:
        from megacoder.train.loop import train

        train(config)
    else:
        from megacoder.train.launch import launch_workers
        from megacoder.train.loop import check_inputs

        check_inputs(config, num_ranks=run.nproc)  # what cannot work is refused before any process starts
        words = ["train", str(run.path), *run.overrides]
        launch_workers(words, nproc=run.nproc, stop_signals=config.stop_signals)


def read_run(argv: Sequence[str], *, prog: str, flags: Sequence[str], absent: dict[str, Any] | None = None) -> RunWords:
    """Reads the words of a command that takes RUN.toml, then `--nproc`, its own `flags` and overrides in any order.

    `absent` has defaults for settings that the file leaves out, where they are not RunConfig's own.
    """
    words = list(argv)
    if not words or words[0].startswith("-"):
        if words in (["-h"], ["--help"]):
            parse_args(RunConfig, words, prog=prog)
        raise ConfigError(f"the first argument is the run's TOML file; usage: {prog}")
    path = Path(words.pop(0))
    nproc, words = take_nproc(words)
    overrides = [word for word in words if word not in flags]
    config = parse_args(RunConfig, overrides, prog=prog, default=load_toml(RunConfig, path, absent=absent))
    given = frozenset(word for word in words if word in flags)
    return RunWords(path=path, overrides=overrides, config=config, nproc=nproc, flags=given)


def take_nproc(words: list[str]) -> tuple[int | None, list[str]]:
    """The number after `--nproc`, None if it is not given, and the other words."""
    for index, word in enumerate(words):
        if word == "--nproc" or word.startswith("--nproc="):
            text = word.partition("=")[2] or (words[index + 1] if index + 1 < len(words) else "")
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError(f"--nproc {text!r}: expected a number of processes, at least 1")
            return int(text), words[:index] + words[index + 1 + ("=" not in word) :]
    return None, words
