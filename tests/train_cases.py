"""A training run small enough for a test: a corpus of a few functions, its tokenizer and data, and a TOML file.

And what tests do with runs: change settings, stop one, read what it logged.
"""

import os
import signal
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path

import torch
from data_samples import write_texts

from megacoder.core.config import to_toml
from megacoder.data.stream import StreamConfig
from megacoder.data.tokenizer_training import train_tokenizer
from megacoder.model.config import ModelConfig
from megacoder.parallel.world import World
from megacoder.train.config import DataConfig, RunConfig
from megacoder.train.loop import Trainer
from megacoder.train.metrics_log import read_metrics
from megacoder.train.schedule import ScheduleConfig

ALONE = World(0, 1, 0, torch.device("cpu"), None)


def changed(config, **changes):
    """A copy with other values; a dict names the fields to change within a part of it."""
    values = {name: getattr(config, name) for name in changes}
    return replace(config, **{
        name: changed(values[name], **value) if isinstance(value, dict) and is_dataclass(values[name]) else value
        for name, value in changes.items()
    })  # fmt: skip


def functions(count: int, first: int = 0) -> list[str]:
    """Small Python files that resemble each other enough to be learnt."""
    verbs = ["add", "scale", "shift", "clip", "fold"]
    return [
        "".join(
            f"def {verb}_{number}(value, other={number % 7}):\n"
            f'    """Return value {verb} {number}."""\n'
            f"    result = value * {number % 5} + other\n"
            f"    return result\n\n\n"
            for verb in verbs
        )
        for number in range(first, first + count)
    ]


@dataclass(frozen=True)
class Case:
    """Where the parts are."""

    folder: Path
    vocab_size: int

    def config(self, output: str, **changes: object) -> RunConfig:
        """Eight steps of eight windows in fp32, a checkpoint every three, but for `changes` (see `changed`)."""
        settings: dict[str, object] = {
            "output": self.folder / output,
            "data": DataConfig(
                train=(self.folder / "train",), valid=(self.folder / "valid",), tokenizer=self.folder / "tokenizer",
                stream=StreamConfig(seq_length=32, num_streams=16),
            ),
            "model": ModelConfig(
                vocab_size=self.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, init_std=0.05,
            ),
            "schedule": ScheduleConfig(peak_lr=1e-2, warmup_steps=2),
            "steps": 8, "global_batch_size": 8, "micro_batch_size": 2, "device": "cpu", "dtype": "float32",
            "checkpoint_every": 3, "eval_every": 4, "eval_batches": 2,
        }  # fmt: skip
        return changed(RunConfig(**settings), **changes)  # type: ignore[arg-type]

    def toml(self, output: str, **changes: object) -> Path:
        """Writes `config(...)` as a file."""
        path = self.folder / f"{output}.toml"
        path.write_text(to_toml(self.config(output, **changes)), encoding="utf-8")
        return path


def make_case(folder: Path) -> Case:
    """Writes tokenizer and both datasets into `folder`."""
    parts = {"train": functions(40), "valid": functions(10, first=100)}
    tokenizer = train_tokenizer(parts["train"], vocab_size=300)
    tokenizer.save(folder / "tokenizer")
    for name, texts in parts.items():
        write_texts(folder / name, texts, tokenizer)
    return Case(folder, tokenizer.vocab_size)


def run(world: World, config: RunConfig) -> None:
    Trainer(config, world).run()


def leave(trainer: Trainer, *, saving: bool = True) -> None:
    """Ends a run where it is, with a checkpoint or without."""
    if saving:
        trainer._checkpoint()
    trainer.folder.finish()
    trainer.batches.close()


def run_to(world: World, config: RunConfig, step: int) -> None:
    """Updates up to that step, which is saved; only a whole run writes metrics."""
    trainer = Trainer(config, world)
    while trainer.step < step:
        trainer.update()
    leave(trainer)


def stop_in(trainer: Trainer, step: int, number: int = signal.SIGTERM) -> None:
    """The process gets a signal as that step begins."""
    update = trainer.update

    def update_and_ask():
        if trainer.step + 1 == step:
            os.kill(os.getpid(), number)
        return update()

    trainer.update = update_and_ask


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def scalars(folder: Path, name: str, below: str = "") -> list[tuple[int, float]]:
    """(step, value) as TensorBoard reads them, of the run or of what is scored `below` it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / below))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]
