"""The folder that holds a run's checkpoints: names, `latest`, completeness, publication and rotation.

A checkpoint gets its name `step-00001000` in one rename, after everything in it has been flushed to the device; before
that it has a temporary name, new in every attempt, that no reader looks at. So a kill at any moment leaves the older
checkpoint, the new one, or both; never half of one under a real name. Readers take the newest complete one. `latest`
names it for people and scripts: it moves after the rename, and may be behind if something went wrong in between.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from megacoder.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megacoder.checkpoint.tensor_file import size_fault
from megacoder.core.console import say, say_once
from megacoder.core.errors import CheckpointError
from megacoder.core.files import fsync_path, remove_stale_temporaries, write_text

__all__ = [
    "CHECKPOINTS", "HELD_OUT", "best_checkpoint", "checkpoint_of_step", "checkpoints_in", "discard", "find_checkpoint",
    "folder_faults", "latest_fault", "open_checkpoint", "publish", "recover", "rotate", "step_folders", "step_name",
    "temporary_for",
]  # fmt: skip

CHECKPOINTS = "checkpoints"
"""Folder of checkpoints in a run's folder."""
LATEST = "latest"
HELD_OUT = "held_out"
"""In a checkpoint's state, if it was measured at its step: the held-out `loss`, and the `tokens` that it is of."""

_ENDS_SHOWN = 4  # of a long list of steps, in a message
_STEP_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint; names sort as steps do below 10^8 steps."""
    if step < 0:
        raise ValueError(f"step {step}: steps count from 0")
    return f"step-{step:08d}"


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every published checkpoint in `root`, complete or not, oldest first."""
    children = root.iterdir() if root.is_dir() else ()
    matches = [(_STEP_NAME.fullmatch(child.name), child) for child in children]
    return sorted((int(match.group(1)), child) for match, child in matches if match)


def open_checkpoint(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint; else CheckpointError with the first of its `folder_faults`."""
    manifest = read_manifest(folder / MANIFEST)
    faults = folder_faults(folder, manifest)
    if faults:
        raise CheckpointError(faults[0])
    return manifest


def folder_faults(folder: Path, manifest: Manifest) -> list[str]:
    """A line for each file of a checkpoint that is missing, cut off, not a file, or not in the manifest."""
    faults = [size_fault(folder / name, sums.size) for name, sums in manifest.files.items()]
    match = _STEP_NAME.fullmatch(folder.name)
    if match and int(match.group(1)) != manifest.step:
        faults.append(f"{folder / MANIFEST}: is of step {manifest.step}, which is not the folder's step")
    with suppress(FileNotFoundError):  # a run has just removed it: its files are among the faults
        for child in sorted(folder.iterdir()):
            if child.name != MANIFEST and child.name not in manifest.files:
                faults.append(f"{child}: not part of the checkpoint; move it elsewhere")
    return [fault for fault in faults if fault is not None]


def checkpoints_in(path: Path) -> Path:
    """The folder of checkpoints of a run's folder; any other path is returned as it is."""
    below = path / CHECKPOINTS
    return below if below.is_dir() else path


def checkpoint_of_step(path: Path, step: int) -> Path:
    """The checkpoint of `step` of a run, or in a folder of checkpoints; CheckpointError that lists the steps found."""
    there = dict(step_folders(checkpoints_in(path)))
    if step not in there:
        steps = [str(known) for known in there] or ["none"]
        listed = steps if len(steps) <= 2 * _ENDS_SHOWN else [*steps[:_ENDS_SHOWN], "...", *steps[-_ENDS_SHOWN:]]
        raise CheckpointError(f"{path}: no checkpoint of step {step}; there are {', '.join(listed)}")
    return there[step]


def find_checkpoint(path: Path) -> Path:
    """`path` itself when it is a checkpoint, else the newest complete one in it.

    `path` may also be a run's folder, which has them in `checkpoints/`. Reports on stderr which ones it skips, and if
    `latest` names a different one. Raises CheckpointError when there is none.
    """
    if _STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return path
    path = checkpoints_in(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder of checkpoints")
    steps = step_folders(path)
    for _, folder in reversed(steps):
        try:
            open_checkpoint(folder)
        except CheckpointError as error:
            say_once(f"skipping {folder.name}: {error}")
        else:
            named = _named_by_latest(path)
            if named not in (None, folder.name):
                say_once(
                    f"{path / LATEST} names {named!r}; using {folder.name}, which is the newest complete checkpoint"
                )
            return folder
    if step_folders(path) != steps:  # a run has saved a newer one meanwhile, and removed these
        return find_checkpoint(path)
    hint = "; convert a Hugging Face folder with megacoder checkpoint import" if (path / "config.json").exists() else ""
    raise CheckpointError(f"{path}: holds no complete checkpoint{hint}")


def latest_fault(root: Path) -> str | None:
    """The error line for a `latest` that names none of the checkpoints beside it, else None."""
    named = _named_by_latest(root)
    if named is None or named in [folder.name for _, folder in step_folders(root)]:
        return None
    if named != _named_by_latest(root):  # a run has moved it meanwhile, and removed that checkpoint
        return latest_fault(root)
    return f"{root / LATEST}: names {named!r}, which is not a checkpoint here; remove the file: readers do not need it"


def recover(root: Path) -> None:
    """Makes `root` ready for a new writer after a kill at any moment; only for the one process that writes there.

    Puts back a checkpoint that was about to be replaced by a new one of the same step, and removes everything else that
    a killed writer left.
    """
    for child in root.glob("step-*.tmp-*-replaced"):
        final = child.with_name(child.name.split(".")[0])
        if not final.exists():
            os.rename(child, final)
    remove_stale_temporaries(root)


def temporary_for(root: Path, step: int, attempt: str) -> Path:
    """Where one attempt at saving a step is written."""
    return root / f"{step_name(step)}.tmp-{attempt}"


def publish(temporary: Path) -> Path:
    """Gives a finished temporary folder its real name and points `latest` to it; returns the real path.

    A folder of that name (the step was reached before, and the run then resumed from an older one) is replaced. If
    `latest` cannot be written, that is reported but is not a failure, since readers do not need it. `latest` never
    moves from a complete checkpoint to one of an earlier step, which a later conversion may add.
    """
    final = temporary.with_name(temporary.name.split(".")[0])
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    fsync_path(temporary)
    if final.exists():  # a folder cannot be renamed over another; after a kill in between, `recover` puts it back
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    fsync_path(final.parent)
    try:
        _move_latest(final)
    except OSError as error:
        say(f"{final.parent / LATEST} was not updated to {final.name}, which is complete: {error.strerror or error}")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _move_latest(final: Path) -> None:
    steps = {folder.name: step for step, folder in step_folders(final.parent)}
    named = _named_by_latest(final.parent)
    if named is not None and steps.get(named, 0) > steps[final.name] and _is_whole(final.parent / named):
        return
    write_text(final.parent / LATEST, final.name + "\n")


def _named_by_latest(root: Path) -> str | None:
    """The text of `latest`, valid or not; None where there is no such file."""
    try:
        return (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def discard(temporary: Path) -> None:
    """Removes a temporary folder in which other ranks may be writing; renames it first, so that they notice."""
    doomed = temporary.with_name(f"{temporary.name}-failed")
    try:
        os.rename(temporary, doomed)
    except OSError:  # another rank was first, or it was never made
        return
    shutil.rmtree(doomed, ignore_errors=True)


def best_checkpoint(root: Path, *, step: int) -> tuple[float, int, Path] | None:
    """(loss, step, folder) of the complete checkpoint up to `step` with the lowest held-out loss, the first of equals.

    Each says its own loss, so that no other file decides. Losses of other held-out tokens than the last one's are left
    out of the comparison.
    """
    found: list[tuple[dict[str, Any], int, Path]] = []
    for number, folder in step_folders(root):
        with suppress(CheckpointError):
            if number <= step and (held_out := open_checkpoint(folder).state.get(HELD_OUT)):
                found.append((held_out, number, folder))
    alike = [(one["loss"], *rest) for one, *rest in found if one["tokens"] == found[-1][0]["tokens"]]
    return min(alike, default=None)


def rotate(root: Path, *, step: int, keep_last: int, keep_every: int | None, keep_best: bool = False) -> list[Path]:
    """Removes the checkpoints that need not be kept after the one just saved at `step`; returns them.

    Keeps the `keep_last` newest complete ones, those whose step is a multiple of `keep_every`, and with `keep_best` the
    `best_checkpoint`. Also leaves later steps alone, which the run saved before it resumed from an older checkpoint,
    and broken ones among the newest.
    """
    best = best_checkpoint(root, step=step) if keep_best else None
    spared = None if best is None else best[2]
    removed, whole = [], 0
    for number, folder in reversed(step_folders(root)):
        if number > step:
            continue
        if whole < keep_last:
            whole += _is_whole(folder)
        elif folder != spared and (keep_every is None or number % keep_every != 0):
            doomed = folder.with_name(f"{folder.name}.tmp-rotated")  # never half of it under a real name
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(folder)
    return removed


def _is_whole(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True
