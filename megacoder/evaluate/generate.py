"""Prompts to continuations: batched, with a key-value cache, greedy unless a temperature is given.

Legend: B sequences of one batch, V vocabulary.
A result depends on the model, its prompt and its place in the list alone, not on what shares its batch: padding is
invisible (`megacoder.model.kv_cache`), and a sampled sequence draws from a generator keyed by (seed, place). Batches
are cut from the prompts sorted by length, so that little is padded, and shrink when half of their sequences are done.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacoder.core.errors import ConfigError, DataError
from megacoder.model.config import ModelConfig
from megacoder.model.kv_cache import KVCache
from megacoder.model.transformer import Transformer

__all__ = ["Sampling", "generate"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked."""

    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it"""
    top_p: float = 1.0
    """draw from the fewest tokens that together are this likely (arXiv:1904.09751), above 0 and at most 1"""
    seed: int = 0
    """the same seed draws the same tokens"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature}: must be 0 (greedy) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0 and at most 1")


@torch.no_grad()  # not inference_mode: rotary tables that move to a GPU here must serve training later
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """The new tokens of each prompt, up to its first of `stop_ids` (not included) or `max_new_tokens` of them.

    Raises DataError for a prompt that is empty, holds an id outside the vocabulary, or leaves no room for
    `max_new_tokens` in the model's `max_position_embeddings`.
    """
    for place, prompt in enumerate(prompts):
        _check_prompt(prompt, place, max_new_tokens, model.config)
    sampling = Sampling() if sampling is None else sampling
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        picker = _Picker(sampling, places, max_new_tokens, model.lm_head.weight.device)
        new = _generate_batch(model, [prompts[place] for place in places], max_new_tokens, set(stop_ids), picker)
        for place, tokens in zip(places, new, strict=True):
            results[place] = tokens
    return results


def _generate_batch(
    model: Transformer, prompts: list[Sequence[int]], max_new_tokens: int, stop_ids: set[int], picker: "_Picker"
) -> list[list[int]]:
    weight, lengths = model.lm_head.weight, [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    tokens_BS = torch.tensor(padded, device=weight.device)
    cache = KVCache(model.config, lengths, capacity=width + max_new_tokens, like=weight)
    results: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt that each sequence of the batch continues
    done: set[int] = set()
    for step in range(max_new_tokens):
        next_B = picker.pick(model.logits(model(tokens_BS, cache=cache)[:, -1]), rows, step)
        for row, token in zip(rows, next_B.tolist(), strict=True):
            if token in stop_ids:
                done.add(row)
            elif row not in done:
                results[row].append(token)
        if len(done) == len(prompts):
            break
        going = [index for index, row in enumerate(rows) if row not in done]
        if 2 * len(going) <= len(rows):
            kept_B = torch.tensor(going, device=weight.device)
            cache.keep(kept_B)
            next_B, rows = next_B[kept_B], [rows[index] for index in going]
        tokens_BS = next_B[:, None]
    return results


class _Picker:
    """Picks next tokens for the sequences of one batch; their random numbers are drawn before the first step."""

    def __init__(self, sampling: Sampling, places: list[int], max_new_tokens: int, device: torch.device) -> None:
        self.sampling = sampling
        if sampling.temperature > 0:
            drawn = [_uniform_numbers(sampling.seed, place, max_new_tokens) for place in places]
            self.uniform_BN = torch.stack(drawn).to(device)

    def pick(self, logits_BV: Tensor, rows: list[int], step: int) -> Tensor:
        """One id for each row (B,)."""
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        probabilities, ids_BV = (logits_BV.float() / self.sampling.temperature).softmax(-1).sort(-1, descending=True)
        upto_BV = probabilities.cumsum(-1)
        # a token is kept if those before it do not reach top_p: the likeliest always is
        kept_B = (upto_BV - probabilities < self.sampling.top_p).sum(-1, keepdim=True) - 1
        drawn_B = self.uniform_BN[rows, step, None] * upto_BV.gather(-1, kept_B)
        index_B = torch.minimum((upto_BV <= drawn_B).sum(-1, keepdim=True), kept_B)
        return ids_BV.gather(-1, index_B).squeeze(-1)


def _uniform_numbers(seed: int, place: int, count: int) -> Tensor:
    key = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.rand(count, generator=generator)


def _check_prompt(prompt: Sequence[int], place: int, max_new_tokens: int, config: ModelConfig) -> None:
    if not prompt:
        raise DataError(f"prompt {place} is empty; a model needs at least one token, such as BOS")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
        raise DataError(
            f"prompt {place} holds token {wrong}, but the model knows {config.vocab_size} tokens; made with another "
            "tokenizer?"
        )
    if len(prompt) + max_new_tokens > config.max_position_embeddings:
        raise DataError(
            f"prompt {place} has {len(prompt)} tokens; with {max_new_tokens} new ones it does not fit into the model's "
            f"{config.max_position_embeddings} positions"
        )
