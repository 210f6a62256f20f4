"""A small tokenizer, corpus files and an overfitted model for the tests of evaluation."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiny_models
import torch

from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import train_tokenizer
from megacoder.evaluate.held_out import SourceFile
from megacoder.model.config import ModelConfig
from megacoder.model.transformer import Transformer
from megacoder.ops.adamw import AdamWConfig, adamw_
from megacoder.ops.cross_entropy import IGNORE_INDEX

FUNCTION = """\
def {name}(items, limit):
    # keeps what is small enough
    total = 0
    for item in items:
        if item.{name} < limit:
            total += item.{name} * 2
    return total


"""
NAMES = ["weight", "height", "price", "volume"]


def source_file(path: str, names: list[str], *, repo: str = "shop") -> SourceFile:
    text = "".join(FUNCTION.format(name=name) for name in names)
    return SourceFile(sample=repo, repo=repo, path=path, language="Python", content=f"# {path}\n{text}")


def source_files() -> list[SourceFile]:
    return [
        source_file("first.py", NAMES[:2]),
        source_file("second.py", NAMES[2:]),
        source_file("third.py", [NAMES[1], NAMES[3]], repo="yard"),
    ]


def write_shard(path: Path, files: list[SourceFile]) -> None:
    columns = ["sample", "repo", "path", "language", "content"]
    pq.write_table(pa.table({name: [getattr(file, name) for file in files] for name in columns}), path)


def make_tokenizer() -> Tokenizer:
    return train_tokenizer([file.content for file in source_files()], vocab_size=320)


def make_model(tokenizer: Tokenizer, **changes) -> Transformer:
    sizes = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0,
        "max_position_embeddings": 320, "init_std": 0.05,
    }  # fmt: skip
    return tiny_models.make_model(ModelConfig(**(sizes | changes)))


def overfit(model: Transformer, examples: list[tuple[list[int], list[int]]], *, steps: int) -> None:
    """Trains on (prompt, answer) pairs, the loss on the answers alone, until they are known by heart."""
    states = [[param.detach().clone().flatten(), *torch.zeros(2, param.numel())] for param in model.parameters()]
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(examples):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    order = random.Random(0)
    for step in range(1, steps + 1):
        rows = order.sample(range(len(examples)), k=min(8, len(examples)))
        model.zero_grad()
        (model.loss(tokens[rows], labels[rows]) / (labels[rows] != IGNORE_INDEX).sum()).backward()
        for param, state in zip(model.parameters(), states, strict=True):
            adamw_(
                param.detach().view(-1), *state, param.grad.view(-1),
                config=AdamWConfig(), lr=3e-3, step=step, grad_scale=1.0, decayed=False,
            )  # fmt: skip
