"""`megacoder train RUN.toml`: pre-training, alone, under torchrun, or (with --nproc) starting torchrun itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from megacoder.cli.run_words import RankOptions, read_run
from megacoder.core.config import to_toml
from megacoder.core.errors import ConfigError
from megacoder.train.launch import launch_workers
from megacoder.train.loop import check_inputs, train

__all__ = ["TrainOptions", "main"]

PROG = "megacoder train RUN.toml [--nproc N] [--print-config]"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RankOptions):
    """Pre-trains a model as RUN.toml says, or goes on with a run; any of its settings may be given as an option."""

    print_config: bool = False
    """print all settings as TOML, and do nothing else"""


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then dotted overrides such as `--schedule.peak-lr 3e-4`."""
    run = read_run(TrainOptions, argv, prog=PROG)
    config, options = run.config, run.options
    if config.data.conversations.train:
        raise ConfigError(f"{run.path} trains on conversations; use megacoder sft {run.path}")
    if options.print_config:
        print(to_toml(config), end="")
    elif (nproc := options.ranks_to_start) is not None:
        check_inputs(config, num_ranks=nproc)  # what cannot work is refused before any process starts
        launch_workers(["train", *argv], nproc=nproc, stop_signals=config.stop_signals)
    else:
        train(config)
