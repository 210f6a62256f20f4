"""Which model for this machine and this time: a shape, a batch and a number of steps that fit.

On a CPU a few million parameters learn most in a few minutes: a larger model sees too few tokens. The number of steps
follows from the measured time of a microbatch, rounded down to a coarse ladder, so that a machine's noise seldom
changes it; it is then written into run.toml and stays.

Files to fill in are shown suffix first (SPM), unlike the paper's: there the middle follows its prefix as in any text,
which so small a model makes use of at once. In the paper's order it does not find the end of the prefix in this time:
after 1,500 steps its lines had 9% edit similarity, and 28% in this order.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import torch

from megacoder.checkpoint.writer import CheckpointConfig
from megacoder.cli.quickstart.options import Paths
from megacoder.core.device import Machine
from megacoder.data.fim import FimConfig
from megacoder.data.stream import StreamConfig
from megacoder.model.config import ModelConfig
from megacoder.model.init import init_weights
from megacoder.model.stage import forward_backward
from megacoder.model.transformer import Transformer
from megacoder.parallel.flat import FlatParameters
from megacoder.train.config import DataConfig, RunConfig
from megacoder.train.schedule import ScheduleConfig

__all__ = ["Recipe", "choose_recipe", "run_config", "seconds_per_step", "steps_within"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and how it is trained. `model.vocab_size` is the tokenizer's, which is trained later."""

    model: ModelConfig
    fim_context: int
    """tokens around a hole (see `FimConfig.context_tokens`)"""
    global_batch_size: int
    micro_batch_size: int
    peak_lr: float


_model = partial(ModelConfig, head_dim=64, rope_theta=10000.0, init_std=0.02)  # 0.006 is for models 100 times as wide

SMALL = Recipe(
    model=_model(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1,
        max_position_embeddings=256,
    ),
    fim_context=96, global_batch_size=16, micro_batch_size=8, peak_lr=2.5e-3,
)  # fmt: skip
MEDIUM = Recipe(
    model=_model(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=512,
    ),
    fim_context=192, global_batch_size=16, micro_batch_size=8, peak_lr=1.5e-3,
)  # fmt: skip
LARGE = Recipe(
    model=_model(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        max_position_embeddings=1024,
    ),
    fim_context=512, global_batch_size=128, micro_batch_size=16, peak_lr=1e-3,
)  # fmt: skip


LADDER = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8)
"""Numbers of steps that are easy to read, none more than a quarter below the next."""


def choose_recipe(machine: Machine, minutes: float) -> Recipe:
    """LARGE where there is a GPU; on a CPU MEDIUM from an hour on."""
    if machine.device_type == "cuda":
        return LARGE
    return SMALL if minutes < 60 else MEDIUM


def run_config(
    recipe: Recipe, paths: Paths, *, steps: int, nproc: int, dtype: torch.dtype, vocab_size: int, seed: int
) -> RunConfig:
    """The training run, as `megacoder train` reads it."""
    every = max(1, steps // 8)
    per_rank = max(1, round(recipe.global_batch_size / nproc))  # so that any number of processes divides the batch
    micro = max(size for size in range(1, recipe.micro_batch_size + 1) if per_rank % size == 0)
    stream = StreamConfig(
        seq_length=recipe.model.max_position_embeddings, seed=seed,
        fim=FimConfig(rate=0.5, spm_rate=1.0, context_tokens=recipe.fim_context),
    )  # fmt: skip
    return RunConfig(
        output=paths.run,
        data=DataConfig(
            train=(paths.train_data,), valid=(paths.heldout_data,), tokenizer=paths.tokenizer, stream=stream
        ),
        model=replace(recipe.model, vocab_size=vocab_size),
        schedule=ScheduleConfig(kind="three_stage", peak_lr=recipe.peak_lr, warmup_steps=max(1, min(50, steps // 10))),
        steps=steps,
        global_batch_size=per_rank * nproc,
        micro_batch_size=micro,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        checkpoint_every=every,
        checkpoint=CheckpointConfig(keep_last=2),
        eval_every=every,
        eval_batches=4,
        seed=seed,
    )


def seconds_per_step(config: RunConfig, machine: Machine, *, nproc: int) -> float:
    """Time of one update on one of `nproc` ranks, from a few microbatches run here with a rank's share of the cores.

    The memory that this took on a GPU is returned: the ranks, which are other processes, need it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, machine.num_cores // nproc))
    try:
        seconds = _seconds_per_microbatch(config, torch.device(machine.device_type))
    finally:
        torch.set_num_threads(threads)
        torch.cuda.empty_cache()  # without effect where CUDA was not used
    return seconds * config.global_batch_size / (config.micro_batch_size * nproc)


def _seconds_per_microbatch(config: RunConfig, device: torch.device) -> float:
    """The shortest of a few."""
    model = Transformer(config.model)
    init_weights(model, seed=0)
    FlatParameters(model.named_parameters(), dtype=getattr(torch, config.dtype), device=device)
    length = config.data.stream.seq_length
    tokens = torch.randint(0, config.model.vocab_size, (config.micro_batch_size, length), device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        forward_backward(model, tokens, tokens).total.item()
        best = min(best, time.perf_counter() - start)
    return best


def steps_within(minutes: float, seconds: float, *, overhead: float = 1.2) -> int:
    """Steps of `seconds` each that fit into `minutes`, rounded down to one of LADDER times a power of ten.

    `overhead` covers what a microbatch alone does not show: update, communication, held-out losses, neighbours.
    """
    fits = max(1.0, 60 * minutes / (seconds * overhead))
    magnitude = 10.0 ** math.floor(math.log10(fits))
    return max(1, int(magnitude * max(factor for factor in LADDER if factor * magnitude <= fits)))
