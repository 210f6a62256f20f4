"""How the files of all ranks become one checkpoint: each rank writes its file and a sealed part; the first joins them.

The ranks communicate through the temporary folder alone: they do so from background threads, where a collective could
interleave with one of the training loop. Parts that appear in the folder are progress. When the folder vanishes the
attempt is over: published under its real name, or given up by a rank that failed (which needs no space on a full
disk). The file system must show all ranks one folder, as training requires anyway.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megacoder.checkpoint.folders import publish
from megacoder.checkpoint.manifest import MANIFEST, Manifest, encode_manifest, merge_manifests, read_manifest
from megacoder.checkpoint.rank_file import RankFile
from megacoder.checkpoint.tensor_file import write_tensor_file
from megacoder.core.errors import CheckpointError
from megacoder.core.files import fsync_path

__all__ = ["GaveUp", "await_outcome", "commit", "rank_file_name", "write_part"]

_LOOK_EVERY = 1 << 26
"""Bytes after which a writing rank checks whether the attempt is over."""


class GaveUp(CheckpointError):
    """The save is over for this rank because another has failed, whose error says why."""


def rank_file_name(rank: int, num_ranks: int) -> str:
    """Name of the file that a rank writes."""
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
    """Writes one rank's file, then its part: a manifest of that file alone.

    Stops early, with GaveUp, where another rank has given up: ranks that wait for this one in the next
    collective then wait no longer than a few bytes take to write, so the two time-outs need not match.
    """
    with _noticing_its_end(temporary):
        sums = write_tensor_file(temporary / file, plan.stored, _while_it_lasts(temporary, data))
        part = Manifest(step=step, layout=layout, state=state, files={file: sums}, tensors=plan.entries)
        _write_whole(_part_path(temporary, file), encode_manifest(part))


def _while_it_lasts(temporary: Path, data: Iterable[memoryview]) -> Iterator[memoryview]:
    """`data` in pieces; FileNotFoundError before the next one once the folder is gone."""
    for view in data:
        for start in range(0, len(view), _LOOK_EVERY):
            temporary.lstat()
            yield view[start : start + _LOOK_EVERY]


def commit(temporary: Path, num_ranks: int, *, timeout_seconds: float) -> Path:
    """Waits for all parts, joins them into the manifest and publishes; returns the checkpoint's folder.

    Raises CheckpointError when a rank gives up or is not done in time, or the parts do not cover every tensor.
    """
    parts = [_part_path(temporary, rank_file_name(rank, num_ranks)) for rank in range(num_ranks)]
    with _noticing_its_end(temporary):
        _await_parts(temporary, parts, timeout_seconds)
        merged = merge_manifests([read_manifest(part) for part in parts])
        for part in parts:
            part.unlink()
        _write_whole(temporary / MANIFEST, encode_manifest(merged))
        return publish(temporary)


def await_outcome(temporary: Path, *, timeout_seconds: float) -> None:
    """Waits, on the ranks that do not commit, until the attempt is over; CheckpointError if that takes too long.

    All ranks thereby reach their next collective at about the same time, however slow one writes.
    """
    for pause in _pauses(timeout_seconds):
        if not temporary.exists():
            return
        if pause is None:
            raise CheckpointError(f"the first rank did not commit {temporary.name} in {timeout_seconds:g} s")
        time.sleep(pause)


def _pauses(timeout_seconds: float) -> Iterator[float | None]:
    """Seconds to sleep before each further check, growing to one, and None at the last."""
    deadline = time.monotonic() + timeout_seconds
    pause = 0.01
    while time.monotonic() < deadline:
        yield pause
        pause = min(1.0, 1.5 * pause)
    yield None


@contextmanager
def _noticing_its_end(temporary: Path) -> Iterator[None]:
    """Explains the error of a rank whose temporary folder has vanished under it."""
    try:
        yield
    except FileNotFoundError:
        if temporary.exists():
            raise
        raise GaveUp(
            f"{temporary} is gone: another rank gave up, or this host no longer sees the folder that the first rank "
            "writes to"
        ) from None


def _await_parts(temporary: Path, parts: list[Path], timeout_seconds: float) -> None:
    for pause in _pauses(timeout_seconds):
        names = set(os.listdir(temporary))
        missing = [part.stem for part in parts if part.name not in names]
        if not missing:
            return
        if pause is None:
            raise CheckpointError(
                f"{len(missing)} of {len(parts)} ranks did not finish writing in {timeout_seconds:g} s; the first is "
                f"{missing[0]}"
            )
        time.sleep(pause)


def _part_path(temporary: Path, file: str) -> Path:
    return (temporary / file).with_suffix(".json")


def _write_whole(path: Path, content: bytes) -> None:
    """As `core.files.replacing`, but never makes the folder: if it has vanished, the attempt was given up."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(content)
    fsync_path(unfinished)
    os.rename(unfinished, path)
