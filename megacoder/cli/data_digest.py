"""`megacoder data digest RUN.toml`: a digest of the tokens that each step of a run sees, on any number of ranks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megacoder.cli.run_words import read_run
from megacoder.core.errors import ConfigError
from megacoder.data.digest import step_digests
from megacoder.data.skipping import parse_steps
from megacoder.train.setup import load_tokenizer, open_before

__all__ = ["main"]

PROG = "megacoder data digest RUN.toml"
USAGE = f"{PROG} --steps A:B [--dp N] [any setting of the run, as in megacoder train]"


@dataclass(frozen=True, kw_only=True)
class DigestConfig:
    """Prints a SHA-256 per step of the tokens, labels and document starts that all ranks of a run together see; further
    options are settings of the run."""

    steps: str
    """A:B, from step A through step B, counted from 1 as in the run's log; or a single step"""
    dp: int = 1
    """number of data-parallel ranks to read the data as; the digests do not depend on it"""
    checkpoint: Path | None = None
    """start from the data position in this checkpoint of the run, written before step A, instead of from the
    beginning"""
    json: bool = False
    """print JSON"""

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise ConfigError(f"dp = {self.dp}: must be at least 1")
        self.range()

    def range(self) -> tuple[int, int]:
        """(A, B)."""
        return parse_steps("steps", self.steps)


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then the command's own options and dotted overrides of the run's settings."""
    run = read_run(
        DigestConfig, argv, prog=PROG, absent=lambda _: {"output": "digest"}, lists_settings=False, usage=USAGE
    )
    options, config = run.options, run.config
    first, last = options.range()
    ranks, done = open_before(first, config, load_tokenizer(config), checkpoint=options.checkpoint, dp=options.dp)
    digests = step_digests(ranks, skip=first - 1 - done, steps=last - first + 1)
    if options.json:
        print(json.dumps({str(step): digest for step, digest in enumerate(digests, start=first)}, indent=2))
        return
    for step, digest in enumerate(digests, start=first):
        print(f"step {step:>8}  {digest}", flush=True)
