"""The output folder: one build at a time, one configuration, and in the end nothing that is not part of the corpus."""

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megacoder.core.errors import ConfigError
from megacoder.core.files import LOCK, exclusive, making_dir, remove_stale_temporaries, write_json
from megacoder.corpus.shards import PARTS, disk_errors

__all__ = ["WORK", "claim_folder", "give_up", "keep_only"]

WORK = "work"
"""Sub-folder for what a build needs only until it ends."""

_CONFIG = "config.json"


@contextmanager
def claim_folder(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Locks `out` for a build with this `identity`, and removes what a killed build left half-written.

    ConfigError if `out` holds a build with another identity (the error names the first key that differs) or something
    else entirely; CorpusError while another build holds the lock.
    """
    identity = json.loads(json.dumps(identity))
    with ExitStack() as held:
        with disk_errors(out):
            held.enter_context(making_dir(out))
            held.enter_context(exclusive(out, what="build"))
        _check_identity(out, identity)
        for folder in (out, out / WORK, *(out / part for part in PARTS)):
            remove_stale_temporaries(folder)
        if _identity_in(out) != identity:
            with disk_errors(out):
                write_json(out / _CONFIG, identity)
        yield


def keep_only(out: Path, files: Collection[str]) -> None:
    """Removes the work folder, and from `PARTS` all but `files`: shards left from an earlier state of the inputs."""
    for part in PARTS:
        for path in sorted((out / part).glob("*")):
            if f"{part}/{path.name}" not in files:
                path.unlink()
        if (out / part).is_dir() and not any((out / part).iterdir()):
            (out / part).rmdir()
    shutil.rmtree(out / WORK, ignore_errors=True)


def give_up(out: Path, *, keep: bool) -> None:
    """Removes what a failed build wrote; `keep` says that an earlier corpus is here and stays."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    if not keep:
        (out / _CONFIG).unlink(missing_ok=True)


def _check_identity(out: Path, identity: dict[str, Any]) -> None:
    found = _identity_in(out)
    others = sorted(child.name for child in out.iterdir() if not child.name.startswith((_CONFIG, LOCK)))
    if found is None:
        if others:
            raise ConfigError(f"{str(out)!r} is not empty and holds no corpus ({others[0]}); choose another --out")
        return
    begun = any((out / WORK).glob("*.json"))  # a task has finished
    if not begun and set(others) <= {WORK} and isinstance(found, dict) and found.keys() == identity.keys():
        return  # a build without a finished task does not fix the configuration
    here, wanted = _flat(found), _flat(identity)
    for key in sorted({*here, *wanted}):
        if here.get(key) != wanted.get(key):
            raise ConfigError(
                f"{str(out)!r} was built with {key} = {here.get(key)!r}, not {wanted.get(key)!r}; "
                "choose another --out, or remove that folder"
            )


def _identity_in(out: Path) -> Any:
    """The identity that the folder was claimed with, None if it was not."""
    try:
        return json.loads((out / _CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out / _CONFIG}: not readable ({error}); choose another --out") from None


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(table, dict):
        return {prefix.rstrip("."): table}
    return {key: value for name, inner in table.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
