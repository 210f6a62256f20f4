"""The folder of a run: its resolved configuration, which a later start must match, and its checkpoints.

What must match is in `megacoder.train.resuming`, what a checkpoint holds of a model in `megacoder.train.fragments`.
"""

import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacoder.checkpoint.folders import CHECKPOINTS, HELD_OUT, best_checkpoint, step_folders
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.checkpoint.writer import CheckpointWriter
from megacoder.core.config import differences, to_dict, to_toml
from megacoder.core.console import say
from megacoder.core.errors import AlikeOnAllRanks, CheckpointError, ConfigError, DamagedCheckpoint
from megacoder.core.files import exclusive, remove_stale_temporaries, write_text
from megacoder.data.continuing import continued
from megacoder.data.prefetch import Prefetcher
from megacoder.data.sidecar import fingerprint
from megacoder.data.skipping import data_step
from megacoder.data.stream import merge_states
from megacoder.model.conversion import model_of
from megacoder.parallel.collectives import barrier
from megacoder.parallel.journal import CHECKPOINT
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import failing_together, gather_json
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.engine import Engine
from megacoder.train.fragments import state_fragments
from megacoder.train.guard import Guard, RunStopped
from megacoder.train.resuming import check_goes_on, check_same_run, open_start

__all__ = ["STOPPED", "RunFolder"]

_OF_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Weights that grow where a run has a larger vocabulary than those it starts from, by rows that are the mean of the
others. These give a new id the mean of all logits, in every context, and so no more than the average probability: n new
ids lower the log-probabilities of the others by log(1 + n / rows) at most, and the model goes on computing what it did
(Hewitt 2021, "Initializing new word embeddings for pretrained language models"). Ids with small random rows, and logits
near 0, take nearly all of the probability where other logits are far below 0."""

STOPPED = "stopped"
"""A file in a run's folder that says why the guard ended the run. While it is there the run does not start."""


class RunFolder:
    """`config.output`; creating it checks that what is there belongs to the same run, and that the run may resume."""

    def __init__(self, config: RunConfig, mesh: Mesh, batches: Prefetcher) -> None:
        """`batches` are at their beginning; with `init_data`, a new run's are moved to where they go on."""
        world = mesh.world
        self.config, self.mesh = config, mesh
        self._fingerprints: list[str] = []
        with failing_together(world):
            if world.is_first:
                self._fingerprints = [fingerprint(prefix) for prefix in config.data.train]
        self._start = open_start(config, world)  # first, so that a run that cannot start so leaves no folder
        if self._start is not None and config.init_data:
            self._go_on_in_data(self._start, batches)
        _refuse_stopped(config.output / STOPPED)
        self._held = ExitStack()
        self._hold()
        old = check_same_run(config)
        self.checkpoints = CheckpointWriter(config.output / CHECKPOINTS, world, config.checkpoint)
        self._newest = self._open_newest()
        if self._newest is not None:
            check_goes_on(self._newest, config, old)

    def _hold(self) -> None:
        """The first rank locks the folder; AlikeOnAllRanks if another run is at work in it."""
        with failing_together(self.mesh.world):
            if self.mesh.world.is_first:
                self._held.enter_context(exclusive(self.config.output, what="run"))
                remove_stale_temporaries(self.config.output)

    def _open_newest(self) -> CheckpointReader | None:
        """The newest complete checkpoint, if there is one."""
        root = self.config.output / CHECKPOINTS
        with failing_together(self.mesh.world):
            reader = CheckpointReader(root) if step_folders(root) else None
        return self._alike(reader)

    def _open_older(self, damaged: CheckpointReader, why: str) -> CheckpointReader:
        """The newest complete checkpoint before a damaged one; CheckpointError that says `why` if there is none."""
        older = None
        with failing_together(self.mesh.world):
            for step, folder in reversed(step_folders(self.config.output / CHECKPOINTS)):
                if older is None and step < damaged.step:
                    with suppress(CheckpointError):
                        older = CheckpointReader(folder)
            if older is None:
                raise CheckpointError(why)
        if self.mesh.world.is_first:
            say(f"skipping {damaged.folder.name}: {why}")
        self._alike(older)
        check_goes_on(older, self.config, check_same_run(self.config))
        return older

    def _alike(self, reader: CheckpointReader | None) -> CheckpointReader | None:
        """`reader`; AlikeOnAllRanks if ranks would load others, as on hosts that do not share the folder."""
        root = self.config.output / CHECKPOINTS
        steps = gather_json(None if reader is None else reader.step, self.mesh.world)
        if any(step != steps[0] for step in steps):
            other = next(rank for rank, step in enumerate(steps) if step != steps[0])
            seen = [f"rank {rank} {_checkpoint_seen(steps[rank])}" for rank in (0, other)]
            raise AlikeOnAllRanks(f"{root}: {' and '.join(seen)}; all hosts must see the same output folder")
        return reader

    def resume(self, engine: Engine, batches: Prefetcher, guard: Guard) -> int:
        """Loads the newest complete checkpoint if there is one; returns the step it was taken at, 0 for a new run.

        One whose bytes turn out to be damaged is named and skipped, as an incomplete one is: a restart would meet it
        again. A new run gets the weights of `init_from`, where that is given, and with `init_optimizer` the optimizer's
        state; with `init_data` its batches have been moved already.
        The run's settings are written last: data of another order than the checkpoint's is refused here, and leaves
        them as they were.
        """
        step = 0
        if self._newest is not None:
            step = self._go_on_from(self._newest, engine, batches, guard)
        elif self._start is not None:
            self._start_from(self._start, engine)
        self._newest = self._start = None  # closes their files
        if self.mesh.world.is_first:  # every rank has read the old file by now, since they have agreed on a checkpoint
            write_text(self.config.output / RUN_TOML, to_toml(self.config))
        return step

    def _go_on_from(self, reader: CheckpointReader, engine: Engine, batches: Prefetcher, guard: Guard) -> int:
        batches.load_state_dict(reader.state["data"])  # first, since it may refuse
        with failing_together(self.mesh.world):
            self._check_same_data(reader, advice="choose another output")
        if (damage := self._read(reader, engine, with_optimizer=True)) is not None:
            return self._go_on_from(self._open_older(reader, damage), engine, batches, guard)
        if "guard" in reader.state:  # absent from a checkpoint that no run has written
            guard.load_state_dict(reader.state["guard"])
        return reader.step

    def _go_on_in_data(self, reader: CheckpointReader, batches: Prefetcher) -> None:
        with failing_together(self.mesh.world):
            batches.load_state_dict(continued(reader.state["data"], batches.state_dict()))
            self._check_same_data(reader, advice="leave init_data out")

    def _check_same_data(self, reader: CheckpointReader, *, advice: str) -> None:
        """ConfigError, on the first rank, if a dataset has been replaced by another of the same size."""
        there = reader.state.get("fingerprints", self._fingerprints)  # absent from an older checkpoint
        for prefix, before, now in zip(self.config.data.train, there, self._fingerprints, strict=False):
            if before != now:
                raise ConfigError(
                    f"{prefix} is another dataset (fingerprint {now}) than the one that {reader.folder} was trained on "
                    f"({before}); put that one back, or {advice}"
                )

    def _start_from(self, reader: CheckpointReader, engine: Engine) -> None:
        damage = self._read(reader, engine, with_optimizer=self.config.init_optimizer, growing=_OF_VOCABULARY)
        if damage is not None:  # no other weights than those asked for
            raise AlikeOnAllRanks(damage)
        if self.mesh.world.is_first:
            config, before = self.config, model_of(reader)
            old, new = before.vocab_size, config.model.vocab_size
            silent = {"init_std", "vocab_multiple"}  # these change nothing in given weights
            changes = [
                f"; {name} {here} (there {there})"
                for name, there, here in differences(before, config.model, silent | {"vocab_size"})
            ]
            extras = [("optimizer state", config.init_optimizer), ("place in the data", config.init_data)]
            *others, last = ["weights", *(name for name, is_taken in extras if is_taken)]
            what = f"{', '.join(others)} and {last}" if others else last
            say(f"{what} of {reader.folder}, step {reader.step}{''.join(changes)}")
            if new > old:
                say(f"vocabulary enlarged from {old:,} to {new:,} rows; the new ones begin as the mean of the others")
            if not config.init_data:
                self._name_repeated_data(reader)

    def _name_repeated_data(self, reader: CheckpointReader) -> None:
        """One line if the run that `reader` is of began with documents that this one begins with, too.

        Their order depends on the seed and on the dataset's place among several.
        """
        config, data = self.config, self.config.data
        seed, theirs = data.stream.seed, reader.state.get("config", {}).get("data", {})
        if theirs.get("stream", {}).get("seed") != seed:
            return
        left_out = (data_step(1, data.left_out) - 1) * config.global_batch_size * data.stream.seq_length
        if left_out >= reader.state["data"]["windows"] * theirs["stream"]["seq_length"]:  # all that was read
            return
        there = reader.state.get("fingerprints", [])
        pairs = zip(data.train, self._fingerprints, there, strict=False)
        again = [str(prefix) for prefix, ours, other in pairs if ours == other]
        if again:
            say(
                f"data.stream.seed = {seed}, as in the run that these weights come from: {', '.join(again)} will be "
                "read in the same order from its beginning; "
                + ("init_data = true goes on where that run stopped, and " if config.may_go_on_in_data else "")
                + "another seed starts with other documents"
            )

    def _read(
        self, reader: CheckpointReader, engine: Engine, *, with_optimizer: bool, growing: Collection[str] = ()
    ) -> str | None:
        """None, or on every rank what is damaged; `engine` then holds a part of it, to be read over."""
        optimizer, damage = engine.optimizer, None
        held = optimizer.state()
        wanted = held if with_optimizer else {"weight": held["weight"]}
        with failing_together(self.mesh.world):
            try:
                fragments = state_fragments(engine.model, optimizer.owned, wanted, copies=True)
                reader.read_all(fragments, growing=growing)
            except DamagedCheckpoint as error:
                damage = str(error)
        for found in filter(None, gather_json(damage, self.mesh.world)):
            return str(found)
        optimizer.publish_master(held["weight"])
        if with_optimizer:
            optimizer.num_updates = reader.state["num_updates"]
        return None

    def save(
        self, step: int, engine: Engine, batches: Prefetcher, guard: Guard, *, held_out: dict[str, Any] | None = None
    ) -> float:
        """Starts a checkpoint, on disk after the next `save` or `finish`; returns the seconds that training waited.

        `held_out` is `HeldOut.record` of the loss at this step, if it was measured.
        """
        began = time.perf_counter()
        ours = batches.state_dict() if self.mesh.speaks_for_replica else None
        positions = gather_json(ours, self.mesh.world)
        state = {
            "num_updates": engine.optimizer.num_updates,
            "data": merge_states([position for position in positions if position is not None]),
            "guard": guard.state_dict(),
            "fingerprints": self._fingerprints,
            "config": to_dict(self.config),
            **({HELD_OUT: held_out} if held_out else {}),
        }
        optimizer = engine.optimizer
        fragments = list(state_fragments(engine.model, optimizer.owned, optimizer.state(), copies=False))
        self.checkpoints.save(step, fragments, state=state, layout=asdict(self.mesh.dims))
        return time.perf_counter() - began

    def stop(self, step: int, stopped: RunStopped) -> None:
        """Ends the run that `stopped` in `step`, on every rank: completes the save in flight and unlocks the folder.

        If a restart would only end the same way, the folder is marked so that the run does not start again.
        """
        self.mesh.world.journal.at(CHECKPOINT)  # the save in flight may take longer than a step may
        self.checkpoints.conclude()
        if self.mesh.world.is_first and not stopped.restart_helps:
            path = self.config.output / STOPPED
            try:
                write_text(path, f"step {step}: {stopped}\n")
            except OSError as error:
                say(f"{path}: {error.strerror or error}; so nothing prevents the run from being started again")
        barrier(self.mesh.world.group)  # else a rank that exits makes torchrun kill the first one before it has written
        self._held.close()

    def finish(self) -> None:
        """Waits until the last checkpoint is complete, then unlocks the folder."""
        self.checkpoints.wait()
        self._held.close()

    def name_best(self) -> None:
        """At the end of a run, on one rank: a line about the checkpoint that `keep_best` has kept."""
        if self.config.checkpoint.keep_best and (
            best := best_checkpoint(self.checkpoints.root, step=self.config.steps)
        ):
            loss, _, folder = best
            say(f"checkpoint with the lowest held-out loss, {loss:.4f}: {folder}")


def _refuse_stopped(path: Path) -> None:
    if path.exists():
        reason = path.read_text(encoding="utf-8", errors="replace").strip()
        raise AlikeOnAllRanks(f"{path}: the run was stopped at {reason}. To start it anyway, remove that file")


def _checkpoint_seen(step: int | None) -> str:
    return "sees no checkpoint" if step is None else f"would resume from step {step}"
