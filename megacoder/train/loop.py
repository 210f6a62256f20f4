"""The training loop: batches in, updates out, everything else around that.

One loop for every layout: the engine computes (see `megacoder.train.engine`), and what the ranks tell each other here
is one small all-reduce per step of (loss sum, tokens, asked to stop, a checkpoint is due by the first rank's clock), at
times with every rank's seconds.

A stop signal is answered at the end of the step, on every rank: checkpoint, then exit. What went wrong in a step (an
update that was skipped, replicas that differ) is judged by `megacoder.train.guard` and `.replicas`, which may end the
run; the run's folder then says whether it may be started again.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from types import FrameType

import torch

from megacoder.core.console import ProgressBar, progress, say
from megacoder.core.errors import AlikeOnAllRanks, MegacoderError, alike_on_all_ranks
from megacoder.core.memory import peak_memory
from megacoder.core.rates import known_peak
from megacoder.data.prefetch import Prefetcher
from megacoder.data.readings import Reading, describe_readings, readings
from megacoder.parallel.journal import CHECKPOINT
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.watch import Watch
from megacoder.parallel.world import World, failing_together, gather_json, launched_ranks
from megacoder.train.causes import describe_causes
from megacoder.train.config import RunConfig
from megacoder.train.guard import Guard, RunStopped
from megacoder.train.layout import Layout
from megacoder.train.metrics_log import HELD_OUT_LOSS, METRICS, MFU, MetricsLog, read_metrics
from megacoder.train.pace import Pace
from megacoder.train.replicas import ReplicaCheck
from megacoder.train.resuming import open_start
from megacoder.train.run_folder import RunFolder
from megacoder.train.setup import load_tokenizer, make_engine, open_stream, resolve_dtype, start_ranks
from megacoder.train.step import Oversight, StepResult, run_step
from megacoder.train.utilization import device_name, utilization_metrics, utilizations
from megacoder.train.validation import HeldOut, describe_losses

__all__ = ["Interrupted", "Trainer", "check_inputs", "train"]


_EXAMINES_EVERY = 16
"""Steps from one skipped update that is examined to the next, so that this takes little of any run."""


class Interrupted(AlikeOnAllRanks):
    """The run was asked to stop and has written a checkpoint."""

    def __init__(self, message: str, *, signal_name: str | None = "SIGINT") -> None:
        """`signal_name` is the signal that this rank received, None if another rank did.

        Whoever sends SIGINT, SIGTERM or SIGHUP to ranks ends torchrun too, and expects 130. A scheduler's signal ahead
        of the time limit is for the ranks only: if their exit code were not 0, torchrun would restart them.
        """
        super().__init__(message)
        self.exit_code = 130 if signal_name in ("SIGINT", "SIGTERM", "SIGHUP") else 0


def check_inputs(config: RunConfig, *, num_ranks: int | None = None) -> None:
    """AlikeOnAllRanks, before ranks meet, if `num_ranks` (by default those that torchrun started) cannot run this
    layout, or if the tokenizer or the initial weights are not for this model."""
    with alike_on_all_ranks():
        config.layout(num_ranks or launched_ranks() or 1)
        load_tokenizer(config)
        open_start(config)


def train(config: RunConfig) -> None:
    """Runs or resumes `config` on the ranks that torchrun started, or on this process alone."""
    check_inputs(config)
    world = start_ranks(config)
    with Watch(world, timeout_seconds=config.timeout_seconds, folder=config.output):
        Trainer(config, world).run()
    world.close()


class Trainer:
    """Everything one rank holds during a run."""

    def __init__(self, config: RunConfig, world: World) -> None:
        config = replace(config, dtype=resolve_dtype(config, world))
        self.config, self.world = config, world
        layout = config.layout(world.size)
        config.execution.check_machine(world.device.type, getattr(torch, config.dtype))
        tokenizer = load_tokenizer(config)
        mesh = Mesh(world, layout.dims, sequence_parallel=config.parallel.sequence_parallel)
        with failing_together(world):
            stream = open_stream(config, tokenizer, dp_rank=mesh.place.dp, dp_size=mesh.dims.dp)
            self.batches = Prefetcher(stream, workers=config.data_workers)
        self.held_out = HeldOut(config, tokenizer, mesh) if config.data.valid else None

        self.folder = RunFolder(
            config, mesh, self.batches
        )  # after all checks of the data: a refused run leaves no folder
        self.engine = make_engine(config, layout, mesh)
        self.guard = Guard(config.guard, max_grad_norm=config.clip_norm)
        self.step = self.folder.resume(self.engine, self.batches, self.guard)
        self.pace = Pace(mesh)
        self.replicas = ReplicaCheck(self.engine, config.guard.compare_replicas_every, since=self.step)
        if world.is_first:
            self._introduce(layout)
        self._peak = known_peak(device_name(world.device), getattr(torch, config.dtype))
        self._checkpoint_seconds = 0.0
        self._paces: dict[str, float] = {}
        self._last_saved = time.monotonic()
        self._stop_asked: str | None = None
        self._examines_from = 0

    def run(self) -> None:
        """Trains to `config.steps`. Raises Interrupted after a signal, once a checkpoint is written, or RunStopped."""
        with self._stopping_on_signals():
            try:
                with self._metrics_log() as log:
                    self._steps(log)
            except RunStopped as stopped:  # on every rank
                self.folder.stop(self.step + 1, stopped)
                raise

    def _steps(self, log: MetricsLog | None) -> None:
        total, is_first = self.config.steps, self.world.is_first
        with self.batches, progress("train", total, start=self.step, quiet=not is_first) as bar:
            while self.step < total:
                self._step(log, bar)
        self.folder.finish()
        if is_first:
            self.folder.name_best()
            say(f"{self.config.output}: all {total:,} steps are done")

    def _step(self, log: MetricsLog | None, bar: ProgressBar) -> None:
        """One update, then what is due after it: held-out loss, a line in the log, a checkpoint."""
        config, began = self.config, time.perf_counter()
        result = self.update()
        seconds = time.perf_counter() - began
        self._maybe_examine(result)
        interrupted = result.stop and self.step < config.steps  # the last step ends the run anyway
        held_out = {} if interrupted else self._maybe_held_out()  # what is due is measured on resuming
        if log is not None:
            if held_out:
                say(f"step {self.step}: held-out loss {describe_losses(held_out)}")
            metrics = self._metrics(result, seconds)
            speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
            if self._peak is not None:
                speed += f"  {metrics[f'{MFU}/causal attention']:.1%} MFU (causal attention)"
            bar.update(self.step, f"loss {result.loss:.3f}  {speed}")
            if self.step % config.log_every == 0 or self._held_out_is_due():
                log.write(self.step, {**metrics, **held_out})
                self._checkpoint_seconds = 0.0
                self._paces = {}
        if result.saves:
            self._checkpoint(held_out)
        if interrupted:
            self.folder.finish()
            raise Interrupted(
                f"stopped at step {self.step} with a checkpoint; the same command resumes the run",
                signal_name=self._stop_asked,
            )

    @contextmanager
    def _metrics_log(self) -> Iterator[MetricsLog | None]:
        """The first rank's log, which receives the held-out loss that an interruption has left to be measured."""
        owed = self._owed_held_out()
        if owed and self.config.checkpoint.keep_best:  # the interruption's checkpoint does not know it yet
            self._checkpoint(owed)
        if not self.world.is_first:
            yield None
            return
        with closing(MetricsLog(self.config.output, resume_step=self.step, amend=owed)) as log:
            yield log

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        numbers = [getattr(signal, name) for name in self.config.stop_signals]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # set by nohup
            numbers = [number for number in numbers if number != signal.SIGHUP]
        previous = {number: signal.signal(number, self._ask_to_stop) for number in numbers}
        try:
            yield
        except MegacoderError as error:
            if self.world.size > 1 and not isinstance(error, AlikeOnAllRanks):
                previous.pop(signal.SIGTERM, None)  # torchrun's must not end this rank before the watch has said why
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _introduce(self, layout: Layout) -> None:
        """A line each about the run, what is held out, where it resumes, and settings that may not do what they say."""
        config, schedule = self.config, layout.schedule
        pipeline = f" ({schedule.name})" if layout.dims.pp > 1 else ""
        say(
            f"{config.model.num_params / 1e6:,.1f}M parameters in {config.dtype}, {layout.dims}{pipeline}, "
            f"{config.steps:,} steps of {config.global_batch_size:,} x {config.data.stream.seq_length:,} tokens"
        )
        if self.held_out is not None:
            sizes = [f"{tokens:,} tokens of {name}" for name, tokens in self.held_out.num_tokens.items()]
            say(f"each held-out loss is of {', '.join(sizes)}")
        elif config.checkpoint.keep_best:
            name = "data.conversations.valid" if config.data.conversations.train else "data.valid"
            say(f"checkpoint.keep_best has no effect: {name} is unset")
        for line in describe_readings(list(map(str, config.data.train)), self._readings()):
            say(line)
        if self.step:
            say(f"resuming from step {self.step}")
        reach = config.model.rope_reach
        if reach is not None and reach < config.data.stream.seq_length:
            say(
                f"data.stream.seq_length = {config.data.stream.seq_length:,}, but {config.model.rope_words}: made for "
                f"{reach:,} positions; raise model.rope_factor"
            )
        if config.warmup_steps >= config.steps:
            say(
                f"steps = {config.steps}: the run ends within the warm-up of {config.warmup_steps:g} steps "
                "(schedule.warmup_steps or warmup_tokens), so the learning rate never reaches schedule.peak_lr = "
                f"{config.schedule.peak_lr:g}"
            )

    def _readings(self) -> list[Reading]:
        """Of the whole run."""
        config, state = self.config, self.batches.state_dict()
        return readings(
            state["order"], seq_length=config.data.stream.seq_length,
            num_windows=config.steps * config.global_batch_size, first_window=state.get("first_window", 0),
        )  # fmt: skip

    def update(self) -> StepResult:
        """The next step: one global batch and one update."""
        number = self.step + 1
        oversight = Oversight(
            limits=self.guard.limits(), replicas=self.replicas, stop_asked=lambda: self._stop_asked is not None,
            save_is_due=self._save_is_due, pace=self.pace,
        )  # fmt: skip
        result = run_step(self.engine, self.batches, self.config, number, oversight=oversight)
        paces, slow = self.pace.compare(result.seconds)
        self._paces |= paces
        for line in slow:
            self._tell(number, line)
        reason = self.guard.note(
            loss=result.loss, grad_norm=result.grad_norm, skipped=result.skipped, num_tokens=result.num_tokens
        )
        if reason is not None:
            self._tell(number, f"update skipped: {reason}")
        self.step = number
        return result

    def _maybe_examine(self, result: StepResult) -> None:
        """Says why the step's update was skipped, if it was and had labels; takes as long as a step."""
        if not result.skipped or not result.num_tokens or result.stop or self.step < self._examines_from:
            return
        served = self.batches.state_dict()["windows"]
        line = describe_causes(
            self.engine, result.batch, self.config, self.guard.limits(),  # as in the step: only updates move them
            step=self.step, windows_before=served - self.config.global_batch_size,
        )  # fmt: skip
        self._tell(self.step, line)
        self._examines_from = self.step + _EXAMINES_EVERY

    def _tell(self, step: int, line: str) -> None:
        """Says something about a step, once for all ranks."""
        if self.world.is_first:
            say(f"step {step}: {line}")

    def _metrics(self, result: StepResult, seconds: float) -> dict[str, float]:
        """`checkpoint_seconds`: how long checkpoints have blocked training since the last line."""
        seq_length = self.config.data.stream.seq_length
        sequence_tokens = self.config.global_batch_size * seq_length
        used = utilizations(
            self.config.model, seq_length, tokens_per_second=sequence_tokens / seconds, num_devices=self.world.size,
            device_peak=math.nan if self._peak is None else self._peak.flops,
        )  # fmt: skip
        return {
            "loss": result.loss,
            "lr": self.config.learning_rate(self.step),
            "grad_norm": result.grad_norm,
            "tokens": self.step * sequence_tokens,
            "tokens_per_second": sequence_tokens / seconds,
            "memory_gib": peak_memory(self.world.device) / 2**30,
            "skipped_updates": self.guard.num_skipped,
            **({"checkpoint_seconds": self._checkpoint_seconds} if self._checkpoint_seconds else {}),
            **utilization_metrics(used),
            **self._paces,
        }

    def _held_out_is_due(self) -> bool:
        due = self.step % self.config.eval_every == 0 or self.step in (1, self.config.steps)
        return self.held_out is not None and due

    def _maybe_held_out(self) -> dict[str, float]:
        if self.held_out is None or not self._held_out_is_due():
            return {}
        self.world.journal.at("held-out loss")
        return self.held_out.losses(self.engine)

    def _owed_held_out(self) -> dict[str, float]:
        """The loss that was due when the run was interrupted, if the line of that step lacks it."""
        if not self._held_out_is_due():
            return {}
        lacks = self.world.is_first and any(
            HELD_OUT_LOSS not in row
            for row in read_metrics(self.config.output / METRICS, quiet=True)  # the log names what is damaged
            if row["step"] == self.step
        )
        return self._maybe_held_out() if any(gather_json(lacks, self.world)) else {}

    def _save_is_due(self) -> bool:
        """By the clock of the first rank, which decides for all of them."""
        minutes = self.config.checkpoint_minutes
        if minutes is None or not self.world.is_first or self.folder.checkpoints.is_writing:
            return False
        return time.monotonic() - self._last_saved >= 60.0 * minutes

    def _checkpoint(self, held_out: dict[str, float] | None = None) -> None:
        self.world.journal.at(CHECKPOINT)
        self._checkpoint_seconds += self.folder.save(
            self.step, self.engine, self.batches, self.guard,
            held_out=self.held_out.record(held_out) if self.held_out and held_out else None,
        )  # fmt: skip
        self._last_saved = time.monotonic()

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        # torchrun sends SIGTERM also when another rank has failed, and then there will be no checkpoint
        if name != "SIGTERM" and self.world.is_first and self._stop_asked is None:
            say(f"{name}: writing a checkpoint after this step")
        self._stop_asked = name
        self.world.journal.stop_asked = True
