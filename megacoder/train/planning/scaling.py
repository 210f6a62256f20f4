"""Batch and learning rate for a budget of tokens, by the scaling laws of DeepSeek-LLM (arXiv:2401.02954, 3.1).

    learning rate = 0.3118 C^-0.1250        tokens of a batch = 0.2920 C^0.3271        C = M D

M is non-embedding FLOPs per token, 72 layers d^2 + 12 layers d seq, and D the tokens of the run. With D = 2T the laws
give the batch and rate that the paper's 6.7B model was trained with; its 1.3B and 33B batches are 26% and 5% below
theirs.
"""

from dataclasses import dataclass

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig

__all__ = ["Advice", "advise", "parse_count"]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the laws say."""

    tokens: float
    """D"""
    compute: float
    """C, FLOPs"""
    peak_lr: float
    batch_tokens: float
    batch_sequences: int
    steps: int
    """of that batch"""


def advise(model: ModelConfig, *, seq_length: int, tokens: float) -> Advice:
    """For a run of `tokens` tokens."""
    if not tokens > 0:
        raise ConfigError(f"tokens = {tokens}: must be above 0")
    layers, dim = model.num_hidden_layers, model.hidden_size
    compute = (72.0 * layers * dim**2 + 12.0 * layers * dim * seq_length) * tokens
    batch = 0.2920 * compute**0.3271
    sequences = max(1, round(batch / seq_length))
    return Advice(
        tokens=tokens, compute=compute, peak_lr=0.3118 * compute**-0.1250, batch_tokens=batch,
        batch_sequences=sequences, steps=max(1, round(tokens / (sequences * seq_length))),
    )  # fmt: skip


def parse_count(text: str) -> float:
    """`2T`, `500B`, `300M` or a plain number."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    digits = text if scale is None else text[:-1]
    try:
        count = float(digits.replace(",", "").replace("_", "")) * (scale or 1.0)
    except ValueError:
        count = 0.0
    if not 0 < count < float("inf"):
        raise ConfigError(f"tokens {text!r}: expected a number above 0 such as 2T, 500B or 300M")
    return count
