"""`megacoder sft RUN.toml`: instruction tuning, alone, under torchrun, or (with --nproc) starting torchrun itself."""

import os
from collections.abc import Sequence

from megacoder.cli.train import read_run
from megacoder.core.config import to_toml
from megacoder.train.loop import check_inputs
from megacoder.train.sft import DEFAULTS, prepare, prepared_run, sft

__all__ = ["main"]

PROG = "megacoder sft RUN.toml [--nproc N] [--prepare-only] [--print-config]"


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then dotted overrides such as `--schedule.peak-lr 2e-5`."""
    run = read_run(argv, prog=PROG, flags=("--prepare-only", "--print-config"), absent=DEFAULTS)
    config = run.config
    if "--print-config" in run.flags:
        print(to_toml(prepared_run(config)), end="")
    elif "--prepare-only" in run.flags:
        prepare(config)
    elif run.nproc is None or "WORLD_SIZE" in os.environ:
        sft(config)
    else:
        from megacoder.train.launch import launch_workers

        check_inputs(config, num_ranks=run.nproc)  # what cannot work is refused before any process starts
        prepare(config)
        words = ["sft", str(run.path), *run.overrides]
        launch_workers(words, nproc=run.nproc, stop_signals=config.stop_signals)
