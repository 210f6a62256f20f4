"""How the ranks of a save become one checkpoint: each leaves its file and a sealed part; the first rank joins them.

The ranks meet through the temporary folder alone, because they do so in background threads, and a collective there
could cross one of the training's. Its existence is the signal: parts that appear in it mean progress, and when it
vanishes the attempt is over, published under its real name or given up by a rank that failed (which needs no space
on a full disk). Asks of the file system what training needs anyway: that all ranks see one folder.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megacoder.checkpoint.folders import publish
from megacoder.checkpoint.manifest import MANIFEST, Manifest, encode_manifest, merge_manifests, read_manifest
from megacoder.checkpoint.rank_file import RankFile
from megacoder.checkpoint.tensor_file import write_tensor_file
from megacoder.core.errors import CheckpointError
from megacoder.core.files import fsync_path

__all__ = ["await_outcome", "commit", "rank_file_name", "write_part"]


def rank_file_name(rank: int, num_ranks: int) -> str:
    """The file of a writer rank."""
    return f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors"


def write_part(
    temporary: Path,
    file: str,
    plan: RankFile,
    data: Iterable[memoryview],
    *,
    step: int,
    layout: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Writes one rank's file, then its part: a manifest of that file alone."""
    sums = write_tensor_file(temporary / file, plan.stored, data)
    part = Manifest(step=step, layout=layout, state=state, files={file: sums}, tensors=plan.entries)
    _write_whole(_part_path(temporary, file), encode_manifest(part))


def commit(temporary: Path, num_ranks: int, *, timeout_seconds: float) -> Path:
    """Waits for all parts, joins them into the manifest and publishes; returns the checkpoint's folder.

    Raises CheckpointError when a rank gives up or is not done in time, or the parts do not cover every tensor.
    """
    parts = [_part_path(temporary, rank_file_name(rank, num_ranks)) for rank in range(num_ranks)]
    for pause in _pauses(timeout_seconds):
        names = _names_in(temporary)
        missing = [part.stem for part in parts if part.name not in names]
        if not missing:
            break
        if pause is None:
            raise CheckpointError(f"{missing[0]} and {len(missing) - 1} others were not done in {timeout_seconds:g} s")
        time.sleep(pause)
    merged = merge_manifests([read_manifest(part) for part in parts])
    for part in parts:
        part.unlink()
    _write_whole(temporary / MANIFEST, encode_manifest(merged))
    return publish(temporary)


def await_outcome(temporary: Path, *, timeout_seconds: float) -> None:
    """Waits, on the ranks that do not commit, until the attempt is over; CheckpointError if that takes too long.

    So that the ranks come to their next collective at about the same time, whoever writes slowest.
    """
    for pause in _pauses(timeout_seconds):
        if not temporary.exists():
            return
        if pause is None:
            raise CheckpointError(f"the first rank did not commit {temporary.name} in {timeout_seconds:g} s")
        time.sleep(pause)


def _pauses(timeout_seconds: float) -> Iterable[float | None]:
    """Seconds to sleep before each further look, growing to one, and None at the last."""
    deadline = time.monotonic() + timeout_seconds
    pause = 0.01
    while time.monotonic() < deadline:
        yield pause
        pause = min(1.0, 1.5 * pause)
    yield None


def _names_in(temporary: Path) -> set[str]:
    try:
        return set(os.listdir(temporary))
    except FileNotFoundError:
        raise CheckpointError("another rank gave up; its own error says why") from None


def _part_path(temporary: Path, file: str) -> Path:
    return (temporary / file).with_suffix(".json")


def _write_whole(path: Path, content: bytes) -> None:
    """As `core.files.replacing`, but never makes the folder: one that has vanished was given up."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(content)
    fsync_path(unfinished)
    os.rename(unfinished, path)
