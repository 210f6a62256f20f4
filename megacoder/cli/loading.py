"""The options of loading a model and of following a run. Without torch: scoring finished answers starts at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from megacoder.core.errors import ConfigError

__all__ = ["Following", "Loading"]


# `Optional[X]`, since at the first `X | None` tyro imports a type checker, which takes as long as ten programs.
@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the model is loaded."""

    tokenizer: Optional[Path] = None
    """folder with tokenizer.json; if unset, the model's"""
    tp: int = 1
    """tensor-parallel processes that share the model"""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """dtype to compute in; stored: the model's own"""

    def __post_init__(self) -> None:
        if self.tp < 1:
            raise ConfigError(f"--tp {self.tp}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Following:
    """Scores over a training run."""

    follow: bool = False
    """score every checkpoint of the run --model in order of step, those to come as they appear, until the run has
    ended; the same command goes on after an interruption"""
    follow_as: Optional[str] = None
    """what the scores are called in the run, to follow it with one benchmark in several ways; if unset, as the
    command"""

    def check(self, model: Path | None, loading: Loading, *, train: Sequence[Path] = ()) -> None:
        """ConfigError where the other options do not go with these, or the name cannot be a folder's."""
        name = self.follow_as
        if name is not None and not self.follow:
            raise ConfigError(f"--follow-as {name}: only with --follow")
        if name is not None and (not name or name.startswith(".") or "/" in name or not name.isprintable()):
            raise ConfigError(f"--follow-as {name!r}: must be a name that a folder can have")
        if self.follow and model is None:
            raise ConfigError("--follow: needs the folder of a run as --model; no other answers have checkpoints")
        if self.follow and loading.tp > 1:
            raise ConfigError(f"--follow with --tp {loading.tp}: checkpoints are loaded by one process; leave --tp out")
        if self.follow and train:
            given = " ".join(map(str, train))
            raise ConfigError(f"--follow with --train {given}: a run is scored without baselines; leave --train out")
