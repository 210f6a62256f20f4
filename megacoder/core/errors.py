"""Errors that a user can act on: one line that quotes the offending value and says what to do.

The command line prints exactly that line and exits with `exit_code`; anything else that escapes is a bug and keeps
its traceback.
"""

import contextlib
from collections.abc import Iterator

__all__ = [
    "AlikeOnAllRanks",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "DamagedCheckpoint",
    "DataError",
    "FormatError",
    "MegacoderError",
    "RankLost",
    "alike_on_all_ranks",
]


class MegacoderError(Exception):
    """Base of every error caused by input, configuration or the machine rather than by a bug."""

    exit_code = 1


class AlikeOnAllRanks(MegacoderError):
    """An error that every rank of a machine meets at the same place, so that only one of them needs to report it."""


class ConfigError(AlikeOnAllRanks):
    """An option, a TOML file or a combination of settings that cannot work."""

    exit_code = 2


class DataError(MegacoderError):
    """Training or evaluation data that is missing, empty or does not fit its description."""


class CorpusError(DataError):
    """Source folders that hold nothing to learn from."""


class FormatError(DataError):
    """A file that is not what its name says: wrong magic, version, size or checksum."""


class CheckpointError(MegacoderError):
    """A checkpoint that cannot be written, is not complete, or does not hold what is needed."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint holds other bytes than those that were written."""


class RankLost(MegacoderError):
    """Another rank died, hangs or cannot be reached, so that this one cannot continue; a restart may well succeed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self, message: str, *, told: bool = False) -> None:
        """`told`: another rank of this host has already printed why the run ended."""
        super().__init__(message)
        self.told = told


@contextlib.contextmanager
def alike_on_all_ranks() -> Iterator[None]:
    """For checks that every rank makes before it meets the others: a MegacoderError in here becomes AlikeOnAllRanks."""
    try:
        yield
    except AlikeOnAllRanks:
        raise
    except MegacoderError as error:
        alike = AlikeOnAllRanks(str(error))
        alike.exit_code = error.exit_code
        raise alike from error
