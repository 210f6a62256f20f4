"""The words of a command that works on a run: RUN.toml, then the command's own options and settings of the run.

The two kinds of options come in any order. A command's own are a dataclass, which takes what it knows first; what is
left overrides settings of the file. So a typo is held against both, and `--help` tells of both.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megacoder.core.config import load_toml, parse_args, parse_known_args, print_help
from megacoder.core.errors import ConfigError
from megacoder.train.config import RunConfig

__all__ = ["RankOptions", "RunWords", "read_run"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """For a command that runs on several ranks."""

    nproc: int | None = None
    """start this many ranks on this machine; if unset, run on those that torchrun started, or in this process alone"""

    def __post_init__(self) -> None:
        if self.nproc is not None and self.nproc < 1:
            raise ConfigError(f"--nproc {self.nproc}: must be at least 1")

    @property
    def ranks_to_start(self) -> int | None:
        """None in a process that is to run itself. The ranks get the same words, and are ranks by torchrun's
        variables."""
        return None if "WORLD_SIZE" in os.environ else self.nproc


@dataclass(frozen=True, kw_only=True)
class RunWords(Generic[T]):
    """A command line that names a run."""

    path: Path
    """its TOML file"""
    options: T
    """the command's own"""
    config: RunConfig
    """the file with the settings given after it"""


def read_run(
    cls: type[T], argv: Sequence[str], *, prog: str, absent: Callable[[T], dict[str, Any]] = lambda _: {},
    lists_settings: bool = True, usage: str | None = None,
) -> RunWords[T]:  # fmt: skip
    """Reads the words of a command whose own options are `cls`; `--help` prints and exits with 0.

    `absent` has defaults for settings that the file leaves out, where they are not RunConfig's own. `lists_settings`:
    whether `--help` lists the run's settings, too; for a command none of whose own options has a setting's name.
    `usage` is told where the file is missing, instead of `prog`.
    """
    words = list(argv)
    path = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    if not {"-h", "--help"}.isdisjoint(words):
        if not lists_settings:
            parse_args(cls, ["--help"], prog=prog)
        print_help(cls, RunConfig, prog=prog, default=path and load_toml(RunConfig, path, absent=absent(cls())))
    if path is None:
        raise ConfigError(f"the first argument is the run's TOML file; usage: {usage or prog}")
    options, overrides = parse_known_args(cls, words, prog=prog, beside=RunConfig)
    default = load_toml(RunConfig, path, absent=absent(options))
    config = parse_args(RunConfig, overrides, prog=prog, default=default, beside=cls)
    return RunWords(path=path, options=options, config=config)
