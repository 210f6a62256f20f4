"""What precedes the first step: the ranks, their dtype and tokenizer, the data that each reads, the model it holds.

Training and its profile begin so; preparing conversations, held-out loss, `megacoder data digest` and `megacoder data
show` need a part of it.
"""

import os
from pathlib import Path
from typing import Literal

import torch

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.config import load_toml
from megacoder.core.device import faster_dtype, probe
from megacoder.core.errors import ConfigError
from megacoder.core.memory import keep_freed_memory
from megacoder.data.continuing import continued
from megacoder.data.conversation_stream import ConversationStream
from megacoder.data.indexed import IndexedDataset
from megacoder.data.megatron_stream import MegatronStream
from megacoder.data.sidecar import open_dataset
from megacoder.data.skipping import SkippingStream
from megacoder.data.stream import ResumableBatches, TokenStream
from megacoder.data.tokenizer import Tokenizer
from megacoder.parallel.collectives import broadcast_from_first
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World, from_torchrun, launched_ranks, start_world
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.engine import Engine
from megacoder.train.layout import Layout

__all__ = [
    "load_tokenizer",
    "make_engine",
    "open_before",
    "open_conversations",
    "open_stream",
    "resolve_dtype",
    "start_ranks",
    "threads_of_a_rank",
]


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
        or_more = ", or what the weights of init_from have, if that is more (a new run enlarges them)"
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} ids; set model.vocab_size = {tokenizer.vocab_size}"
            f"{or_more if config.init_from else ''}"
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


def open_before(
    step: int, config: RunConfig, tokenizer: Tokenizer, *, checkpoint: Path | None, dp: int = 1
) -> tuple[list[ResumableBatches], int]:
    """The streams of `dp` ranks, and how many steps before `step` they have served: those of `checkpoint`, or none."""
    ranks = [open_stream(config, tokenizer, dp_rank=rank, dp_size=dp) for rank in range(dp)]
    if checkpoint is None:
        if config.init_data and config.init_from is not None:
            place = CheckpointReader(config.init_from).state["data"]
            for rank in ranks:
                rank.load_state_dict(continued(place, rank.state_dict()))
        return ranks, 0
    reader = CheckpointReader(checkpoint)
    if reader.step >= step:
        raise ConfigError(
            f"{reader.folder} was written after step {reader.step}; it serves steps from {reader.step + 1} on"
        )
    for rank in ranks:
        rank.load_state_dict(reader.state["data"])
    return ranks, reader.step


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
