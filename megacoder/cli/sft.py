"""`megacoder sft RUN.toml`: instruction tuning, alone, under torchrun, or (with --nproc) starting torchrun itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from megacoder.cli.run_words import RankOptions, read_run
from megacoder.core.config import to_toml
from megacoder.train.launch import launch_workers
from megacoder.train.loop import check_inputs
from megacoder.train.sft import DEFAULTS, prepare, prepared_run, sft

__all__ = ["SftOptions", "main"]

PROG = "megacoder sft RUN.toml [--nproc N] [--prepare-only] [--print-config]"


@dataclass(frozen=True, kw_only=True)
class SftOptions(RankOptions):
    """Tunes a model on conversations as RUN.toml says, or goes on with a run; any of its settings may be given as an
    option."""

    prepare_only: bool = False
    """encode the conversations and write the tokenizer into the run's folder, and do not train"""
    print_config: bool = False
    """print all settings as TOML, with the data that are made of the conversations, and do nothing else"""


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then dotted overrides such as `--schedule.peak-lr 2e-5`."""
    run = read_run(SftOptions, argv, prog=PROG, absent=lambda _: DEFAULTS)
    config, options = run.config, run.options
    if options.print_config:
        print(to_toml(prepared_run(config)), end="")
    elif options.prepare_only:
        prepare(config)
    elif (nproc := options.ranks_to_start) is not None:
        check_inputs(config, num_ranks=nproc)  # what cannot work is refused before any process starts
        prepare(config)
        launch_workers(["sft", *argv], nproc=nproc, stop_signals=config.stop_signals)
    else:
        sft(config)
