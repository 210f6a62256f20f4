"""`megacoder train RUN.toml`: pre-training, alone, under torchrun, or (with --nproc) starting torchrun itself."""

import os
from collections.abc import Sequence
from pathlib import Path

from megacoder.core.config import load_toml, parse_args, to_toml
from megacoder.core.errors import ConfigError
from megacoder.train.config import RunConfig

__all__ = ["main", "take_nproc"]

PROG = "megacoder train RUN.toml [--nproc N] [--print-config]"


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then dotted overrides such as `--schedule.peak-lr 3e-4`."""
    words = list(argv)
    if not words or words[0].startswith("-"):
        if words in (["-h"], ["--help"]):
            parse_args(RunConfig, words, prog=PROG)
        raise ConfigError(f"the first argument is the run's TOML file; usage: {PROG}")
    path = Path(words.pop(0))
    nproc, words = take_nproc(words)
    show = "--print-config" in words
    overrides = [word for word in words if word != "--print-config"]
    config = parse_args(RunConfig, overrides, prog=PROG, default=load_toml(RunConfig, path))
    if config.data.conversations.train:
        raise ConfigError(f"{path} trains on conversations; that is: megacoder sft {path}")
    if show:
        print(to_toml(config), end="")
    elif nproc is None or "WORLD_SIZE" in os.environ:
        from megacoder.train.loop import train

        train(config)
    else:
        from megacoder.train.launch import launch_workers
        from megacoder.train.run_folder import open_start

        open_start(config)
        config.layout(nproc)  # what cannot work is refused before any process starts
        launch_workers(["train", str(path), *overrides], nproc=nproc, stop_signals=config.stop_signals)


def take_nproc(words: list[str]) -> tuple[int | None, list[str]]:
    """The number behind `--nproc`, None where it is not given, and the other words."""
    for index, word in enumerate(words):
        if word == "--nproc" or word.startswith("--nproc="):
            text = word.partition("=")[2] or (words[index + 1] if index + 1 < len(words) else "")
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError(f"--nproc {text!r}: expected a number of processes, at least 1")
            return int(text), words[:index] + words[index + 1 + ("=" not in word) :]
    return None, words
