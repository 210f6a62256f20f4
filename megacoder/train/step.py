"""What training and its profile have in common: the ranks, what each of them holds, and one update.

The loop puts checkpoints, logs and signals around the update, the profile a clock. Neither has a step of its own, so
that what is measured is what trains.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from megacoder.core.config import load_toml
from megacoder.core.device import faster_dtype, probe
from megacoder.core.errors import ConfigError
from megacoder.core.memory import keep_freed_memory
from megacoder.data.conversation_stream import ConversationStream
from megacoder.data.indexed import IndexedDataset
from megacoder.data.megatron_stream import MegatronStream
from megacoder.data.prefetch import ResumableBatches
from megacoder.data.sidecar import open_dataset
from megacoder.data.skipping import SkippingStream
from megacoder.data.stream import Batch, TokenStream
from megacoder.data.tokenizer import Tokenizer
from megacoder.parallel.collectives import broadcast_from_first
from megacoder.parallel.journal import DATA, UPDATE
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World, from_torchrun, launched_ranks, start_world
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.engine import Engine
from megacoder.train.guard import Limits
from megacoder.train.layout import Layout
from megacoder.train.pace import Pace
from megacoder.train.replicas import ReplicaCheck

__all__ = [
    "Batches",
    "StepResult",
    "load_tokenizer",
    "make_engine",
    "open_conversations",
    "open_stream",
    "resolve_dtype",
    "run_step",
    "start_ranks",
    "threads_of_a_rank",
]


class Batches(Protocol):
    """Where a step's sequences come from."""

    def next_batch(self) -> Batch:
        """This data-parallel rank's part of the next global batch."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one update did, the same on every rank."""

    loss: float
    """mean over the global batch's trained tokens, nats"""
    num_tokens: int
    """trained tokens of the global batch"""
    grad_norm: float
    """before clipping; inf where it is not finite"""
    skipped: bool
    """whether the update was skipped"""
    stop: bool
    """a rank was asked to stop"""
    saves: bool
    """a checkpoint is to follow"""
    seconds: tuple[float, ...]
    """of every rank in the step before, without waiting, if that was measured (see `megacoder.train.pace`)"""


def start_ranks(config: RunConfig, *, join_seconds: float = 60.0) -> World:
    """Joins the ranks that torchrun started, or is one alone; ConfigError if they cannot run `config`.

    `join_seconds` is how much later than this rank others may come, at least.
    """
    machine = probe()
    device_type = machine.device_type if config.device == "auto" else config.device
    if device_type == "cuda" and machine.device_type != "cuda":
        raise ConfigError('device = "cuda", but torch sees no GPU here; use device = "auto"')
    likely = "bfloat16" if config.dtype == "auto" else config.dtype
    config.execution.check_machine(device_type, getattr(torch, likely))
    if device_type == "cpu":  # ranks of one machine share its cores instead of fighting for them
        torch.set_num_threads(threads_of_a_rank(machine.num_cores))
        keep_freed_memory()
    config.layout(launched_ranks() or 1)  # what cannot work is refused before ranks wait for others
    return start_world(
        device_type, timeout_seconds=config.timeout_seconds, join_seconds=join_seconds,
        shared_memory=config.parallel.shared_memory,
    )  # fmt: skip


def threads_of_a_rank(num_cores: int) -> int:
    """This rank's share of the cores, or what OMP_NUM_THREADS says; the 1 that torchrun sets for several ranks is
    ignored, since nobody chose it."""
    num_ranks, asked = max(1, from_torchrun("LOCAL_WORLD_SIZE", 1)), os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > (num_ranks > 1):
        return int(asked)
    return max(1, num_cores // num_ranks)


def resolve_dtype(config: RunConfig, world: World) -> Literal["bfloat16", "float32"]:
    """The config's dtype; for `auto` the one that the run began with, or the faster one by the first rank's measure."""
    if config.dtype != "auto":
        return config.dtype
    begun = config.output / RUN_TOML
    is_bf16 = torch.zeros((), device=world.device)
    if world.is_first:
        is_bf16.fill_(
            load_toml(RunConfig, begun).dtype == "bfloat16"
            if begun.exists()
            else faster_dtype(probe()) == torch.bfloat16
        )
    broadcast_from_first(is_bf16, world.group)
    return "bfloat16" if is_bf16.item() else "float32"


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer; ConfigError if the model has another vocabulary.

    A model that starts from given weights may have spare ids, as DeepSeek-Coder's do: 32,256 for 32,022 tokens.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    spare = config.model.vocab_size - tokenizer.vocab_size
    if spare < 0 or (spare > 0 and config.init_from is None):
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} ids; set model.vocab_size to that"
        )
    return tokenizer


def open_conversations(
    config: RunConfig, prefix: Path, tokenizer: Tokenizer, *, dp_rank: int, dp_size: int, epochs: int | None = None
) -> ConversationStream:
    """A rank's windows of what `megacoder.train.sft.prepare` has written to `prefix`."""
    return ConversationStream(
        IndexedDataset(prefix), tokenizer, seq_length=config.data.stream.seq_length, seed=config.data.stream.seed,
        global_batch_size=config.global_batch_size, dp_rank=dp_rank, dp_size=dp_size, epochs=epochs,
    )  # fmt: skip


def open_stream(config: RunConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_size: int) -> ResumableBatches:
    """The training tokens of one data-parallel rank; ConfigError for conversations that are not prepared."""
    whole = _open_whole(config, tokenizer, dp_rank=dp_rank, dp_size=dp_size)
    left_out = config.data.left_out
    return SkippingStream(whole, left_out, global_batch_size=config.global_batch_size) if left_out else whole


def _open_whole(config: RunConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_size: int) -> ResumableBatches:
    data = config.data
    if data.conversations.train:
        if not data.train:
            raise ConfigError(
                "data.train = []: conversations must have been prepared by megacoder sft; name the run.toml in its "
                f"output folder, {config.output}"
            )
        return open_conversations(config, data.train[0], tokenizer, dp_rank=dp_rank, dp_size=dp_size)
    datasets = [open_dataset(prefix, tokenizer) for prefix in data.train]
    shares = {"global_batch_size": config.global_batch_size, "dp_rank": dp_rank, "dp_size": dp_size}
    if data.compat == "megatron":
        return MegatronStream(
            datasets, tokenizer, data.stream, data.megatron,
            num_samples=config.steps * config.global_batch_size, weights=data.weights, **shares,
        )  # fmt: skip
    return TokenStream(datasets, tokenizer, data.stream, weights=data.weights, fim_rates=data.fim_rates, **shares)


def make_engine(config: RunConfig, layout: Layout, mesh: Mesh) -> Engine:
    """This rank's share of the model, with its initial weights; `config.dtype` is no longer `auto`."""
    return Engine(
        config.model, layout, mesh,
        execution=config.execution, bucket_elements=config.parallel.bucket_elements,
        optimizer=config.optimizer,
        dtype=getattr(torch, config.dtype), seed=config.seed,
    )  # fmt: skip


def run_step(
    engine: Engine,
    batches: Batches,
    config: RunConfig,
    number: int,
    *,
    limits: Limits = Limits(),  # noqa: B008, it is frozen
    replicas: ReplicaCheck | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    save_is_due: Callable[[], bool] = lambda: False,
    pace: Pace | None = None,
) -> StepResult:
    """Step `number`, from 1: one global batch and one optimizer update, which every rank skips beyond `limits`.

    `replicas` are compared when they are due, and if the step ends with a checkpoint, as it does when `stop_asked` or
    `save_is_due` says so on any rank. They are called as late as ranks can still agree on the answer, which travels
    with the loss, so that a signal costs no further step.
    """
    journal = engine.mesh.world.journal
    journal.begin_step(number)
    if pace is not None:
        pace.begin(number)
    journal.at(DATA)
    microbatches = engine.microbatches(batches.next_batch(), config.micro_batch_size)
    part = engine.forward_backward(microbatches)
    if pace is not None:
        pace.computed()
    journal.at(UPDATE)
    others = [] if pace is None else pace.report()
    loss_sum, counted, stop, save, *seconds = engine.sum_losses(part, stop_asked(), save_is_due(), *others)
    if pace is not None:
        pace.read()
    saves = stop > 0 or save > 0 or config.ends_with_checkpoint(number)
    if replicas is not None:
        replicas.maybe_compare(number, saves=saves)
        journal.at(UPDATE)
    loss = loss_sum / counted if counted else math.nan  # no token is trained: the update is skipped
    num_updates = engine.optimizer.num_updates
    grad_norm = engine.update(
        lr=config.learning_rate(number),
        num_tokens=max(1, int(counted)),
        max_grad_norm=config.clip_norm,
        skip_above=limits.grad_norm if loss <= limits.loss else -1.0,  # NaN counts as above
    )
    return StepResult(
        loss=loss, num_tokens=int(counted), grad_norm=grad_norm,
        skipped=engine.optimizer.num_updates == num_updates, stop=stop > 0, saves=saves,
        seconds=tuple(seconds),
    )  # fmt: skip
