"""The folder of a run: its resolved configuration, which a later start must match, and its checkpoints.

State goes to disk in parameter space, under Hugging Face names, so that any number of ranks can resume from it: a rank
writes the ranges of each weight that its slice of the flat buffers holds, and reads the ranges that it holds now.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.folders import CHECKPOINTS, step_folders
from megacoder.checkpoint.manifest import MANIFEST
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CheckpointReader, open_together
from megacoder.checkpoint.writer import CheckpointWriter
from megacoder.core.config import check_same, from_dict, load_toml, to_dict, to_toml
from megacoder.core.console import say
from megacoder.core.errors import AlikeOnAllRanks, ConfigError
from megacoder.core.files import exclusive, remove_stale_temporaries, write_text
from megacoder.data.prefetch import Prefetcher
from megacoder.data.sidecar import fingerprint
from megacoder.data.skipping import data_step
from megacoder.data.stream import merge_states
from megacoder.model.conversion import model_of
from megacoder.model.transformer import Transformer, TransformerPart, WeightPiece, weight_pieces
from megacoder.parallel.collectives import barrier
from megacoder.parallel.flat import OwnedRange
from megacoder.parallel.journal import CHECKPOINT
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World, failing_together, gather_json
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.engine import Engine
from megacoder.train.guard import Guard, RunStopped
from megacoder.train.metrics_log import METRICS

__all__ = ["RunFolder", "check_same_run", "load_weights", "open_start", "state_fragments"]

FREE_TO_CHANGE = {
    "output", "device", "checkpoint_every", "checkpoint_minutes", "checkpoint", "eval_every", "eval_batches",
    "log_every", "execution", "micro_batch_size", "parallel", "timeout_seconds", "guard", "stop_signals",
    "data_workers", "steps", "schedule", "data.train", "data.valid", "data.tokenizer", "data.skip_steps",
}  # fmt: skip
"""Settings that may differ when a run resumes: they change nothing (any more), rounding alone (device, layout,
execution), or what becomes of a run that goes wrong. `steps`, `schedule` and `skip_steps` may differ if
`_check_same_past` agrees. Data may have moved: the checkpoint's data position says whether it is the same
(`check_order`)."""

STOPPED = "stopped"
"""A file in a run's folder that says why the guard ended the run. While it is there the run does not start."""

FREE_AT_START = {"rope_theta", "rope_factor", "max_position_embeddings", "init_std", "vocab_multiple"}
"""Model settings that may differ from those of the weights a run starts from: no weight's shape depends on them."""


class RunFolder:
    """`config.output`; creating it checks that what is there belongs to the same run, and that the run may resume."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        world = mesh.world
        self.config, self.mesh = config, mesh
        self._start = open_start(config, world)  # first, so that a run with weights of another model leaves no folder
        _refuse_stopped(config.output / STOPPED)
        self._held = ExitStack()
        self._hold()
        old = check_same_run(config)
        self.checkpoints = CheckpointWriter(config.output / CHECKPOINTS, world, config.checkpoint)
        self._newest = self._open_newest()
        if self._newest is not None:
            _check_goes_on(self._newest, config, old)
        self._fingerprints: list[str] = []
        with failing_together(world):
            if world.is_first:
                self._fingerprints = [fingerprint(prefix) for prefix in config.data.train]

    def _hold(self) -> None:
        """The first rank locks the folder; AlikeOnAllRanks if another run is at work in it."""
        with failing_together(self.mesh.world):
            if self.mesh.world.is_first:
                self._held.enter_context(exclusive(self.config.output, what="run"))
                remove_stale_temporaries(self.config.output)

    def _open_newest(self) -> CheckpointReader | None:
        """The newest complete checkpoint, if there is one.

        Raises AlikeOnAllRanks if ranks would load different ones, as on hosts that do not share the folder.
        """
        root = self.config.output / CHECKPOINTS
        with failing_together(self.mesh.world):
            reader = CheckpointReader(root) if step_folders(root) else None
        steps = gather_json(None if reader is None else reader.step, self.mesh.world)
        if any(step != steps[0] for step in steps):
            other = next(rank for rank, step in enumerate(steps) if step != steps[0])
            seen = [f"rank {rank} {_checkpoint_seen(steps[rank])}" for rank in (0, other)]
            raise AlikeOnAllRanks(f"{root}: {' and '.join(seen)}; all hosts must see the same output folder")
        return reader

    def resume(self, engine: Engine, batches: Prefetcher, guard: Guard) -> int:
        """Loads the newest complete checkpoint if there is one; returns the step it was taken at, 0 for a new run.

        A new run gets the weights of `init_from`, where that is given, and with `init_optimizer` the optimizer's state.
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
            self._check_same_data(reader)
        self._read(reader, engine, with_optimizer=True)
        if "guard" in reader.state:  # absent from a checkpoint that no run has written
            guard.load_state_dict(reader.state["guard"])
        return reader.step

    def _check_same_data(self, reader: CheckpointReader) -> None:
        """ConfigError, on the first rank, if a dataset has been replaced by another of the same size."""
        there = reader.state.get("fingerprints", self._fingerprints)  # absent from an older checkpoint
        for prefix, before, now in zip(self.config.data.train, there, self._fingerprints, strict=False):
            if before != now:
                raise ConfigError(
                    f"{prefix} is another dataset (fingerprint {now}) than the one that {reader.folder} was trained on "
                    f"({before}); put that one back, or choose another output"
                )

    def _start_from(self, reader: CheckpointReader, engine: Engine) -> None:
        self._read(reader, engine, with_optimizer=self.config.init_optimizer)
        if self.mesh.world.is_first:
            there, here = model_of(reader), self.config.model
            changes = [
                f"; {name} {getattr(here, name)} (there {getattr(there, name)})"
                for name in ("max_position_embeddings", "rope_factor", "rope_theta")
                if getattr(here, name) != getattr(there, name)
            ]
            what = "weights and optimizer state" if self.config.init_optimizer else "weights"
            say(f"{what} of {reader.folder}, step {reader.step}{''.join(changes)}")
            self._name_repeated_data(reader)

    def _name_repeated_data(self, reader: CheckpointReader) -> None:
        """One line if the run that `reader` is of began with documents that this one begins with, too.

        Their order depends on the seed and on the dataset's place among several.
        """
        seed, theirs = self.config.data.stream.seed, reader.state.get("config", {}).get("data", {})
        if theirs.get("stream", {}).get("seed") != seed:
            return
        there = reader.state.get("fingerprints", [])
        pairs = zip(self.config.data.train, self._fingerprints, there, strict=False)
        again = [str(prefix) for prefix, ours, other in pairs if ours == other]
        if again:
            say(
                f"data.stream.seed = {seed}, as in the run that these weights come from: {', '.join(again)} will be "
                "read in the same order from its beginning; another seed starts with other documents"
            )

    def _read(self, reader: CheckpointReader, engine: Engine, *, with_optimizer: bool) -> None:
        optimizer = engine.optimizer
        held = optimizer.state()
        wanted = held if with_optimizer else {"weight": held["weight"]}
        with failing_together(self.mesh.world):
            reader.read_all(state_fragments(engine.model, optimizer.owned, wanted, copies=True))
        optimizer.publish_master(held["weight"])
        if with_optimizer:
            optimizer.num_updates = reader.state["num_updates"]

    def save(self, step: int, engine: Engine, batches: Prefetcher, guard: Guard) -> float:
        """Starts a checkpoint, on disk after the next `save` or `finish`; returns the seconds that training waited."""
        began = time.perf_counter()
        ours = batches.state_dict() if self.mesh.speaks_for_replica else None
        positions = gather_json(ours, self.mesh.world)
        state = {
            "num_updates": engine.optimizer.num_updates,
            "data": merge_states([position for position in positions if position is not None]),
            "guard": guard.state_dict(),
            "fingerprints": self._fingerprints,
            "config": to_dict(self.config),
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


def check_same_run(config: RunConfig) -> RunConfig | None:
    """The settings of the run that has begun in `config.output`, None if none has; ConfigError if it is another run.

    A run that has done no step, such as one that ran out of memory, has not begun: any setting may change.
    """
    path = config.output / RUN_TOML
    if not (path.exists() and _has_begun(config.output)):
        return None
    old = load_toml(RunConfig, path)
    if config.dtype == "auto":  # resolved when the run began
        config = replace(config, dtype=old.dtype)
    _check_same_settings(old, config, where=str(path))
    return old


def _check_same_settings(old: RunConfig, new: RunConfig, *, where: str) -> None:
    # Rows that pad the vocabulary are in no checkpoint, and another tp may need other ones.
    new = replace(new, model=replace(new.model, vocab_multiple=old.model.vocab_multiple))
    check_same(old, new, where=where, free=FREE_TO_CHANGE, advice="set it back, or choose another output")


def _has_begun(output: Path) -> bool:
    metrics = output / METRICS
    return bool(step_folders(output / CHECKPOINTS)) or (metrics.exists() and metrics.stat().st_size > 0)


@torch.no_grad()
def load_weights(model: Transformer, reader: CheckpointReader) -> None:
    """Fills `model` from the master weights of a checkpoint."""
    for param in model.parameters():
        param.zero_()  # the rows that pad the vocabulary are in no file
    for piece in weight_pieces(model):
        piece.view.copy_(piece.shard.part(reader.read_tensor(piece.hf_name)))


def open_start(config: RunConfig, world: World | None = None) -> CheckpointReader | None:
    """The checkpoint that a new run starts from, if any; ConfigError if it is of another model or lacks moments.

    The same on all ranks of `world`, which call it at once; without one, this process looks for itself.
    """
    if config.init_from is None:
        return None
    has_begun = bool(step_folders(config.output / CHECKPOINTS))
    if world is not None:
        has_begun = any(gather_json(has_begun, world))
    if has_begun:
        return None
    reader = CheckpointReader(config.init_from) if world is None else open_together(config.init_from, world)
    check_same(
        model_of(reader), config.model, where=f"init_from = {str(config.init_from)!r}", free=FREE_AT_START,
        advice="set the same in this run's [model]",
    )  # fmt: skip
    theta = model_of(reader).rope_theta
    if config.model.rope_theta < theta:
        raise ConfigError(
            f"model.rope_theta = {config.model.rope_theta}, below the {theta} of {reader.folder}: a longer context "
            "takes a larger base, never a smaller one; set it in this run's [model]"
        )
    if config.init_optimizer and not _has_moments(reader):
        raise ConfigError(
            f"init_optimizer = true: {reader.folder} holds weights alone, without AdamW's moments; leave it out, or "
            "name the checkpoint of a run in init_from"
        )
    return reader


def _has_moments(reader: CheckpointReader) -> bool:
    """Whether a run could resume from the checkpoint."""
    return {"exp_avg", "exp_avg_sq"} <= {kind for kind, _ in reader.tensors()}


def state_fragments(
    model: TransformerPart, owned: Iterable[OwnedRange], state: dict[str, Tensor], *, copies: bool
) -> Iterator[Fragment]:
    """A rank's part of every weight, for each kind in `state`, whose tensors hold the elements that the rank `owned`.

    The rows that pad the vocabulary are left out. Without `copies`, what several ranks of a replica hold comes from the
    first of them only, since a checkpoint has it once.
    """
    pieces: dict[str, list[WeightPiece]] = defaultdict(list)
    for piece in weight_pieces(model):
        if copies or not piece.is_copy:
            pieces[piece.param_name].append(piece)
    for part in owned:
        for piece in pieces[part.slot.name]:
            shard = piece.shard
            first = int(piece.view.storage_offset() - part.slot.param.storage_offset())
            start, stop = max(part.start, first), min(part.stop, first + piece.view.numel())
            if start >= stop:
                continue
            offset = part.offset + start - part.start
            for kind, values in state.items():
                yield Fragment(
                    name=piece.hf_name, kind=kind, global_shape=shard.shape,
                    region=Box(shard.offsets, shard.local_shape),
                    start=start - first, stop=stop - first, data=values[offset : offset + stop - start],
                )  # fmt: skip


def _check_goes_on(reader: CheckpointReader, config: RunConfig, old: RunConfig | None) -> None:
    """ConfigError if a run of `config` cannot resume from the checkpoint in its folder.

    `old` are the settings in the run's folder. If they are missing there, the checkpoint's are checked. Otherwise only
    the model is compared with the checkpoint's: an old checkpoint may have settings that no longer exist.
    """
    output, where = str(config.output), f"{reader.folder / MANIFEST}: state.config"
    if not _has_moments(reader):
        raise ConfigError(
            f"output = {output!r}: its checkpoint {reader.folder.name} holds weights alone, from which no run can "
            f"resume; choose another output, and start from these weights with init_from = {output!r}"
        )
    check_same(
        model_of(reader), config.model, where=f"{where}.model", free={"vocab_multiple"}, advice="choose another output"
    )
    if old is None:
        old = from_dict(RunConfig, reader.state["config"], where=where)
        _check_same_settings(old, config, where=where)
    _check_same_past(old, config, reader.step)


def _check_same_past(old: RunConfig, config: RunConfig, step: int) -> None:
    """ConfigError if the first `step` steps of a run would not have been the same under `config` as under `old`.

    A constant rate can be extended, or made to fall, at any time; three stages only until the first has ended.
    """
    start = f"init_from = {str(config.output)!r}, init_optimizer = true"
    advice = f"choose another output, and go on from this run's state with {start}"
    if config.steps < step:
        raise ConfigError(f"steps = {config.steps}: the run in {config.output} has done {step} already; {advice}")
    if config.data.compat == "megatron" and config.data.megatron.num_samples is None and config.steps != old.steps:
        raise ConfigError(
            f"steps = {config.steps}: the run in {config.output} is one of {old.steps}, and Megatron's order of "
            f"samples depends on their number; {advice}"
        )
    for past in range(1, step + 1):
        if data_step(past, old.data.left_out) != data_step(past, config.data.left_out):
            raise ConfigError(
                f"data.skip_steps = {list(config.data.skip_steps)}: the run in {config.output} has done {step} steps, "
                f"and step {past} would have had other data; move its checkpoints from step {past} on away, or {advice}"
            )
        was, now = old.learning_rate(past), config.learning_rate(past)
        if was != now:
            changed = ["schedule"] if old.schedule != config.schedule else []
            changed += [f"steps = {config.steps} (was {old.steps})"] if old.steps != config.steps else []
            raise ConfigError(
                f"{' and '.join(changed)}: the run in {config.output} has done {step} steps, and the learning rate of "
                f"step {past} was {was!r}, not {now!r}; {advice}"
            )


def _refuse_stopped(path: Path) -> None:
    if path.exists():
        reason = path.read_text(encoding="utf-8", errors="replace").strip()
        raise AlikeOnAllRanks(f"{path}: the run was stopped at {reason}. To start it anyway, remove that file")


def _checkpoint_seen(step: int | None) -> str:
    return "sees no checkpoint" if step is None else f"would resume from step {step}"
