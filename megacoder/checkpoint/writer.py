"""Saving: each rank writes what it owns, in the background, and the training loop pays for one copy in memory.

`save` copies the fragments into host memory and returns; a thread writes them, and the first rank's thread commits
once every rank's file is complete (`commit.py`). At most one save is in flight: the next one first waits for it, so a
disk that is too slow slows training instead of filling memory. A failure in the background is raised by the next `save`
or `wait`, where all ranks exchange what failed, on the main thread, and raise the same line about it; or that line is
reported, and the run continues without that checkpoint (`on_failure`). No failure touches an earlier checkpoint. A run
that stops with a different error, the same on every rank, calls `conclude`, so that the save in flight is not lost. Any
other end abandons that save, and the next start removes what it left.
"""

import errno
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megacoder.checkpoint.commit import GaveUp, await_outcome, commit, rank_file_name, write_part
from megacoder.checkpoint.folders import discard, recover, rotate, temporary_for
from megacoder.checkpoint.rank_file import Fragment, RankFile, Staging, live_bytes, plan_rank_file
from megacoder.core.config import check_at_least, check_seconds
from megacoder.core.console import say
from megacoder.core.errors import AlikeOnAllRanks, CheckpointError, ConfigError
from megacoder.parallel.collectives import barrier, broadcast_from_first
from megacoder.parallel.world import World, gather_json

__all__ = ["CheckpointConfig", "CheckpointWriter", "SaveFailed"]


class SaveFailed(CheckpointError, AlikeOnAllRanks):
    """A checkpoint was not saved; the same error on every rank."""


class _DiskFull(CheckpointError):
    """What this rank had to write did not fit."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How checkpoints are written and which are kept."""

    asynchronous: bool = True
    """write in the background, from a copy of the state in host memory"""
    keep_last: int = 3
    """number of newest checkpoints to keep"""
    keep_every: int | None = None
    """also keep checkpoints whose step is a multiple of this; a run writes one at each of these steps"""
    keep_best: bool = False
    """also keep the checkpoint with the lowest held-out loss, of steps at which it is measured (eval_every), and name
    it when the run ends; needs held-out data (data.valid or data.conversations.valid)"""
    on_failure: Literal["stop", "go_on"] = "stop"
    """what the run does when a save fails, as on a full disk; the last save of a run must succeed"""
    timeout_seconds: float = 1800.0
    """how long a rank waits for the others' files before it gives up a save; may exceed the run's `timeout_seconds`,
    since no rank is in a collective then"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "keep_last", prefix="checkpoint.")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(
                f"checkpoint.keep_every = {self.keep_every}: must be at least 1; omit it to keep none permanently"
            )
        check_seconds("checkpoint.timeout_seconds", self.timeout_seconds)


class CheckpointWriter:
    """Writes the checkpoints of one run; every rank has one and makes the same calls."""

    def __init__(self, root: Path, world: World, config: CheckpointConfig) -> None:
        """Takes over `root`: makes the folder, and removes what a killed run left. Call it before reading from `root`.

        Raises AlikeOnAllRanks where a rank does not see what the first one writes there.
        """
        self.root, self.world, self.config = root, world, config
        attempts = torch.zeros(1, dtype=torch.int64, device=world.device)
        if world.is_first:
            root.mkdir(parents=True, exist_ok=True)
            recover(root)
            attempts.fill_(secrets.randbits(48))
        broadcast_from_first(attempts, world.group)
        self._attempts = f"{int(attempts.item()):012x}"
        self._check_shared()
        self._num_saves = 0
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._step = self._num_bytes = 0  # of the last save begun
        self._error: Exception | None = None
        self._last_failure: Exception | None = None

    def save(self, step: int, fragments: Sequence[Fragment], *, state: dict[str, Any], layout: dict[str, Any]) -> float:
        """Saves the state after `step` steps; returns the seconds for which it held up training.

        Over all ranks the fragments must cover every tensor exactly once. `state` (what the loop needs to resume) and
        `layout` (for people) are plain JSON values; the first rank's are kept. Raises SaveFailed on all ranks if
        this save fails (synchronous), or if the one before has failed (asynchronous; this one then does not begin),
        unless `on_failure` is "go_on".
        """
        begin = time.perf_counter()
        self._join(self.config.on_failure)
        job = _Job(
            step=step,
            temporary=temporary_for(self.root, step, f"{self._attempts}-{self._num_saves}"),
            plan=plan_rank_file(rank_file_name(self.world.rank, self.world.size), fragments),
            layout=_plain(layout, "layout"),
            state=_plain(state, "state"),
        )
        self._num_saves += 1
        self._step, self._num_bytes = step, sum(tensor.num_bytes for tensor in job.plan.stored)
        if self.config.asynchronous:
            staged = self._staging.copy_out(job.plan.fragments)
            job.plan.fragments.clear()  # frees tensors made only for this save before it ends
            if self._make_folder(job):
                self._thread = threading.Thread(target=self._run, args=(job, staged), name="checkpoint", daemon=True)
                self._thread.start()
        elif self._make_folder(job):
            self._run(job, live_bytes(job.plan.fragments))
            self._settle(self.config.on_failure)
        return time.perf_counter() - begin

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still busy with the last save; the first one is until all of it is on disk."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises its failure, on all ranks, whatever `on_failure` says."""
        self._join("stop")
        if self._last_failure is not None:
            raise self._last_failure

    def conclude(self) -> None:
        """Finishes the save in flight, if any, when a different error stops the run; only reports a failure."""
        if self._thread is not None and self.world.is_first:
            say(f"finishing the checkpoint of step {self._step}, which was being written")
        self._join("go_on")

    def _join(self, on_failure: Literal["stop", "go_on"]) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle(on_failure)

    def _check_shared(self) -> None:
        """Checks that all ranks see one folder; otherwise hosts would only find out at a save, by timing out."""
        probe = self.root / f"start.tmp-{self._attempts}"
        if self.world.is_first:
            probe.touch()
        barrier(self.world.group)
        seen = gather_json(probe.exists(), self.world)
        if self.world.is_first:
            probe.unlink()
        if not all(seen):
            raise AlikeOnAllRanks(
                f"{self.root}: rank {seen.index(False)} does not see what rank 0 writes there; all hosts must see the "
                "same output folder"
            )

    def _make_folder(self, job: "_Job") -> bool:
        """Makes it on one rank before any writes, so that a missing folder means that the save has been given up."""
        if self.world.is_first:
            try:
                job.temporary.mkdir()
            except OSError as error:
                self._error = self._describe(job, error)
        return self._settle(self.config.on_failure)

    def _run(self, job: "_Job", data: Iterable[memoryview]) -> None:
        """Writes and commits; runs in the background, where nobody would catch an exception."""
        try:
            file, timeout = rank_file_name(self.world.rank, self.world.size), self.config.timeout_seconds
            write_part(job.temporary, file, job.plan, data, step=job.step, layout=job.layout, state=job.state)
            if self.world.is_first:
                commit(job.temporary, self.world.size, timeout_seconds=timeout)
                self._rotate(job.step)
            else:
                await_outcome(job.temporary, timeout_seconds=timeout)
        except BaseException as error:
            discard(job.temporary)
            if not isinstance(error, Exception):  # Ctrl-C during a synchronous save
                raise
            self._error = self._describe(job, error)

    def _describe(self, job: "_Job", error: Exception) -> Exception:
        """The error with its line for the user; one that is a bug stays as it is."""
        if not isinstance(error, OSError):
            return error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _DiskFull(f"{self.root}: {os.strerror(error.errno)}")
        reason = os.strerror(error.errno) if error.errno else error
        return CheckpointError(f"{error.filename or job.temporary}: {reason}")

    def _rotate(self, step: int) -> None:
        """A checkpoint that cannot be removed does not fail the save, complete by now; the next save tries again."""
        try:
            rotate(
                self.root, step=step, keep_last=self.config.keep_last, keep_every=self.config.keep_every,
                keep_best=self.config.keep_best,
            )  # fmt: skip
        except OSError as error:
            say(f"older checkpoints were not removed: {error.filename or self.root}: {error.strerror or error}")

    def _settle(self, on_failure: Literal["stop", "go_on"]) -> bool:
        """Whether all ranks did their part; called on the main thread, by all of them at once.

        Where one did not, every rank raises the same SaveFailed. With `on_failure` "go_on" they continue without this
        checkpoint instead, unless the error of any rank is a bug, which that rank raises as it is.
        """
        error, self._error = self._error, None
        reports = gather_json(None if error is None else _report(error), self.world)
        self._last_failure = None
        if not any(reports):
            return True
        failure = self._failure(reports)
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        if on_failure == "stop" or any(report and report[0] == "bug" for report in reports):
            raise failure
        self._last_failure = failure
        if self.world.is_first:
            say(str(failure))
        return False

    def _failure(self, reports: Sequence[tuple[str, str] | None]) -> SaveFailed:
        """One line for what failed on all ranks; what failed only because another rank had is not counted."""
        met = {rank: report for rank, report in enumerate(reports) if report is not None}
        causes = {rank: report for rank, report in met.items() if report[0] != "gave up"} or met
        first = min(causes, key=lambda rank: (_KINDS.index(causes[rank][0]), rank))
        kind, reason = causes[first]
        alike = [rank for rank, report in causes.items() if report[0] == kind]
        where = f" on {len(alike)} of {len(reports)} ranks" if len(alike) > 1 else f" on rank {first}"
        if kind == "full":
            needed, free = sum(gather_json(self._num_bytes, self.world)), shutil.disk_usage(self.root).free
            reason += f"; the checkpoint needs {needed / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free"
        where = where if len(reports) > 1 else ""
        return SaveFailed(f"saving step {self._step} failed{where}: {reason}; earlier checkpoints are untouched")


_KINDS = ("bug", "full", "other", "gave up")
"""Of errors, the one first that explains the others."""


def _report(error: Exception) -> tuple[str, str]:
    """(kind, line), for the other ranks."""
    if not isinstance(error, CheckpointError):
        return "bug", repr(error)
    kind = "full" if isinstance(error, _DiskFull) else "gave up" if isinstance(error, GaveUp) else "other"
    return kind, str(error)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One rank's share of one save."""

    step: int
    temporary: Path
    plan: RankFile
    layout: dict[str, Any]
    state: dict[str, Any]


def _plain(value: dict[str, Any], what: str) -> dict[str, Any]:
    """A copy by way of JSON, so that the caller may change the original, and a load returns the same value."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} of a checkpoint is not plain JSON: {error}") from None
    if copy != value:
        changed = next((key for key in value if copy.get(key) != value[key]), None)
        raise CheckpointError(
            f"{what} of a checkpoint is not plain JSON: {changed!r} would come back different; "
            "use lists for tuples and strings for keys"
        )
    return copy
