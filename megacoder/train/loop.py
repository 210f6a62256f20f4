"""The training loop: batches in, updates out, everything else around that.

One loop for every layout: the engine computes (see `megacoder.train.engine`), and what the ranks tell each other here
is one small all-reduce per step of (loss sum, tokens, asked to stop).

SIGINT and SIGTERM are answered at the next step's end, on all ranks alike: checkpoint, then exit.
"""

import signal
import time
from dataclasses import replace
from types import FrameType

import torch

from megacoder.core.console import progress, say
from megacoder.core.errors import AlikeOnAllRanks
from megacoder.core.metrics import attention_flops_per_token, training_flops_per_token
from megacoder.data.prefetch import Prefetcher
from megacoder.parallel.collectives import World
from megacoder.parallel.journal import CHECKPOINT
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.watch import Watch
from megacoder.train.config import RunConfig
from megacoder.train.metrics_log import MetricsLog
from megacoder.train.run_folder import RunFolder
from megacoder.train.schedule import learning_rate
from megacoder.train.step import (
    StepResult,
    load_tokenizer,
    make_engine,
    open_stream,
    resolve_dtype,
    run_step,
    start_ranks,
)
from megacoder.train.validation import HeldOut

__all__ = ["Interrupted", "Trainer", "train"]

MAX_SKIPPED_STEPS = 20
"""Updates skipped in a row, for a gradient that is not finite, after which a run ends."""


class Interrupted(AlikeOnAllRanks):
    """The run was asked to stop and has written a checkpoint."""

    exit_code = 130


def train(config: RunConfig) -> None:
    """Runs or resumes `config` on the ranks that torchrun started, or on this process alone."""
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
        self.batches = Prefetcher(open_stream(config, tokenizer, mesh))
        self.held_out = HeldOut(config, tokenizer, mesh) if config.data.valid is not None else None

        self.folder = RunFolder(config, mesh)  # after all that can be wrong with the data: a refusal leaves no folder
        self.engine = make_engine(config, layout, mesh)
        self.step = self.folder.resume(self.engine, self.batches)
        self.skipped_in_a_row = 0
        self._stop_asked = False

    def run(self) -> None:
        """Trains to `config.steps`; Interrupted after a signal, with a checkpoint behind it."""
        config = self.config
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        log = MetricsLog(config.output, resume_step=self.step) if self.world.is_first else None
        try:
            with self.batches, progress("train", config.steps, start=self.step, quiet=not self.world.is_first) as bar:
                while self.step < config.steps:
                    began = time.perf_counter()
                    result = self.update()
                    self.step += 1
                    seconds = time.perf_counter() - began
                    held_out = {} if result.stop else self._maybe_held_out()
                    if log is not None:
                        bar.update(self.step, f"loss {result.loss:.3f}  {result.num_tokens / seconds:,.0f} tokens/s")
                        if self.step % config.log_every == 0 or held_out:
                            log.write(self.step, {**self._metrics(result, seconds), **held_out})
                    if result.stop and self.step < config.steps:
                        self._checkpoint()
                        self.folder.finish()
                        raise Interrupted(f"stopped at step {self.step} with a checkpoint; the same command goes on")
                    if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                        self._checkpoint()
            self.folder.finish()
        finally:
            if log is not None:
                log.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def update(self) -> StepResult:
        """One global batch and one optimizer step."""
        engine = self.engine
        updates = engine.optimizer.num_updates
        result = run_step(engine, self.batches, self.config, self.step + 1, stop_asked=self._stop_asked)
        self.skipped_in_a_row = 0 if engine.optimizer.num_updates > updates else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise AlikeOnAllRanks(
                f"step {self.step + 1}: the gradient was not finite for {MAX_SKIPPED_STEPS} steps in a row; lower "
                f"schedule.peak_lr = {self.config.schedule.peak_lr} or go back to an earlier checkpoint"
            )
        return result

    def _metrics(self, result: StepResult, seconds: float) -> dict[str, float]:
        model, length = self.config.model, self.config.data.stream.seq_length
        attention = attention_flops_per_token(
            layers=model.num_hidden_layers, heads=model.num_attention_heads, head_dim=model.head_dim,
            seq_length=length, causal=True,
        )  # fmt: skip
        sequence_tokens = self.config.global_batch_size * length
        return {
            "loss": result.loss,
            "lr": learning_rate(self.step, self.config.steps, self.config.schedule),
            "grad_norm": result.grad_norm,
            "tokens": self.step * sequence_tokens,
            "tokens_per_second": sequence_tokens / seconds,
            "tflops": training_flops_per_token(model.num_matmul_params, attention) * sequence_tokens / seconds / 1e12,
        }

    def _maybe_held_out(self) -> dict[str, float]:
        due = self.step % self.config.eval_every == 0 or self.step in (1, self.config.steps)
        if self.held_out is None or not due:
            return {}
        self.world.journal.at("held-out loss")
        return {"held_out_loss": self.held_out.loss(self.engine)}

    def _checkpoint(self) -> None:
        self.world.journal.at(CHECKPOINT)
        self.folder.save(self.step, self.engine, self.batches)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.world.is_first and not self._stop_asked:
            say(f"{signal.Signals(number).name}: writing a checkpoint after this step")
        self._stop_asked = self.world.journal.stop_asked = True
