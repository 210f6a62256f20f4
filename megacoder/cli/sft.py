"""`megacoder sft RUN.toml`: instruction tuning, alone, under torchrun, or (with --nproc) starting torchrun itself."""

import os
from collections.abc import Sequence
from pathlib import Path

from megacoder.cli.train import take_nproc
from megacoder.core.config import load_toml, parse_args, to_toml
from megacoder.core.errors import ConfigError
from megacoder.train.config import RunConfig
from megacoder.train.sft import DEFAULTS, prepare, prepared_run, sft

__all__ = ["main"]

PROG = "megacoder sft RUN.toml [--nproc N] [--prepare-only] [--print-config]"


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then dotted overrides such as `--schedule.peak-lr 2e-5`."""
    words = list(argv)
    if not words or words[0].startswith("-"):
        if words in (["-h"], ["--help"]):
            parse_args(RunConfig, words, prog=PROG)
        raise ConfigError(f"the first argument is the run's TOML file; usage: {PROG}")
    path = Path(words.pop(0))
    nproc, words = take_nproc(words)
    flags = {flag for flag in ("--prepare-only", "--print-config") if flag in words}
    overrides = [word for word in words if word not in flags]
    config = parse_args(RunConfig, overrides, prog=PROG, default=load_toml(RunConfig, path, absent=DEFAULTS))
    if "--print-config" in flags:
        print(to_toml(prepared_run(config)), end="")
    elif "--prepare-only" in flags:
        prepare(config)
    elif nproc is None or "WORLD_SIZE" in os.environ:
        sft(config)
    else:
        from megacoder.train.launch import launch_workers

        config.layout(nproc)  # what cannot work is refused before any process starts
        prepare(config)
        launch_workers(["sft", str(path), *overrides], nproc=nproc, stop_signals=config.stop_signals)
