"""A training run small enough for a test: a corpus of a few functions, its tokenizer and data, and a TOML file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacoder.core.config import to_toml
from megacoder.data.indexed import IndexedDatasetWriter, token_dtype
from megacoder.data.stream import StreamConfig
from megacoder.data.tokenizer import train_tokenizer
from megacoder.model.config import ModelConfig
from megacoder.train.config import DataConfig, RunConfig
from megacoder.train.schedule import ScheduleConfig


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
        """Eight steps of eight windows in fp32, a checkpoint every three."""
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
        return RunConfig(**{**settings, **changes})  # type: ignore[arg-type]

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
        with IndexedDatasetWriter(folder / name, dtype=token_dtype(tokenizer.vocab_size)) as writer:
            for text in texts:
                writer.add_document([np.array([*tokenizer.encode(text), tokenizer.eos_id])])
    return Case(folder, tokenizer.vocab_size)
