"""Options of the quickstart, and the paths that it writes."""

import math
from dataclasses import dataclass
from pathlib import Path

from megacoder.core.errors import ConfigError

__all__ = ["Paths", "QuickstartOptions"]


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """From repositories on this machine to a model that fills in code; run it again to resume where it stopped."""

    out: Path = Path("quickstart")
    """folder for everything it makes; do not move it afterwards"""
    input: tuple[Path, ...] = ()
    """folders of repositories; if unset, the standard library and the packages installed here"""
    minutes: float = 7.0
    """training time to aim for; the other stages take some minutes more"""
    steps: int | None = None
    """training steps, instead of as many as fit into --minutes; two runs on one machine are then bitwise equal"""
    vocab_size: int = 8192
    """regular tokens of the tokenizer, control tokens not counted; the paper has 32,000"""
    nproc: int | None = None
    """training processes; if unset, one per GPU, or 2 on a CPU"""
    max_repo_megabytes: float = 4.0
    """take only this much of a larger repository, so that none outweighs all others"""
    seed: int = 1234
    """seed of weights, data order and fill-in-the-middle"""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes {self.minutes:g}: must be positive")
        for name in ("steps", "nproc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if self.vocab_size < 512:
            raise ConfigError(f"--vocab-size {self.vocab_size}: must be at least 512 (256 bytes and some merges)")
        if not 0 < self.max_repo_megabytes < math.inf:
            raise ConfigError(f"--max-repo-megabytes {self.max_repo_megabytes:g}: must be positive")


@dataclass(frozen=True)
class Paths:
    """The parts of the output folder."""

    root: Path

    @property
    def options(self) -> Path:
        """The options that this folder belongs to."""
        return self.root / "quickstart.toml"

    @property
    def corpus(self) -> Path:
        """Documents in Parquet, train/ and heldout/."""
        return self.root / "corpus"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer folder."""
        return self.root / "tokenizer"

    @property
    def train_data(self) -> Path:
        """Prefix of the training tokens."""
        return self.root / "data" / "train"

    @property
    def heldout_data(self) -> Path:
        """Prefix of the held-out tokens."""
        return self.root / "data" / "heldout"

    @property
    def run_config(self) -> Path:
        """What `megacoder train` is started with."""
        return self.root / "run.toml"

    @property
    def run(self) -> Path:
        """Logs and checkpoints of the training run."""
        return self.root / "run"

    @property
    def model(self) -> Path:
        """The export, a Hugging Face folder."""
        return self.root / "model"

    @property
    def evaluation(self) -> Path:
        """Scores."""
        return self.root / "evaluation.json"

    @property
    def infills(self) -> Path:
        """Every infilling task with its answer."""
        return self.root / "infill.jsonl"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"
