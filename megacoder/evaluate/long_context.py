"""Does a model use a long context? Loss by position, and a planted definition that must be found again.

Loss by position: over documents long enough to fill the context, the mean loss of tokens in equal stretches of it.
Where context helps, the loss falls from stretch to stretch; at positions beyond those that a model has learned, it
rises steeply.

Retrieval: many small functions that each return a number, one of which is asked for at the end of the context; a model
that sees it, at whatever depth, continues with its number. Decoding is greedy, and only the complete number counts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megacoder.core.errors import DataError
from megacoder.data.tokenizer import Tokenizer
from megacoder.evaluate.generate import generate
from megacoder.model.transformer import Transformer

__all__ = ["PositionLoss", "Retrieval", "loss_by_position", "retrieval"]

_DIGITS = 4
"""Digits of a planted number; a guess is right once in nine thousand."""


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """One stretch of the context."""

    start: int
    stop: int
    loss: float
    """mean, nats"""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One depth."""

    depth: float
    """of the planted definition: 0 at the beginning of the context, 1 right before the question"""
    found: int
    trials: int


@torch.no_grad()
def loss_by_position(
    model: Transformer, tokenizer: Tokenizer, documents: Sequence[np.ndarray], *, length: int, parts: int = 8
) -> list[PositionLoss]:
    """Over the `documents` of at least `length` ids; DataError where none is that long."""
    weight = model.lm_head.weight
    sums, counts, used = np.zeros(length), np.zeros(length, dtype=np.int64), 0
    for document in documents:
        if len(document) < length:
            continue
        used += 1
        ids = torch.tensor([tokenizer.bos_id, *document[:length].tolist()], device=weight.device)
        logits = model.logits(model(ids[None, :-1])[0]).float()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        sums += losses.double().cpu().numpy()
        counts += 1
    if not used:
        longest = max(map(len, documents), default=0)
        raise DataError(f"no document of {length} tokens among {len(documents)}; the longest has {longest}")
    edges = [round(part * length / parts) for part in range(parts + 1)]
    return [
        PositionLoss(
            start=start, stop=stop, loss=float(sums[start:stop].sum() / counts[start:stop].sum()),
            tokens=int(counts[start:stop].sum()),
        )
        for start, stop in pairwise(edges)
    ]  # fmt: skip


def retrieval(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    length: int,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 10,
    seed: int = 0,
) -> list[Retrieval]:
    """Contexts of about `length` tokens, the answer's included; DataError where not even the question fits."""
    rows = []
    for depth in depths:
        cases = [_planted(tokenizer, length, depth, seed=f"{seed}/{depth}/{trial}") for trial in range(trials)]
        prompts = [prompt for prompt, _ in cases]
        answers = generate(model, prompts, max_new_tokens=_DIGITS, num_ids=tokenizer.vocab_size, batch_size=1)
        found = sum(
            tokenizer.decode(answer).startswith(number) for answer, (_, number) in zip(answers, cases, strict=True)
        )
        rows.append(Retrieval(depth=depth, found=found, trials=trials))
    return rows


def _planted(tokenizer: Tokenizer, length: int, depth: float, *, seed: str) -> tuple[list[int], str]:
    """(prompt that ends before the number, the number)."""
    draw = random.Random(seed)
    number = str(draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
    planted = tokenizer.encode(f"def planted():\n    return {number}\n\n")
    question = tokenizer.encode("assert planted() == ")
    room = length - 1 - _DIGITS - len(planted) - len(question)
    if room < 0:
        raise DataError(
            f"a context of {length} tokens does not hold the planted definition; give at least {length - room}"
        )
    filler: list[list[int]] = []
    while True:
        name, value = f"value_{draw.randrange(10**5)}", draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)
        text = tokenizer.encode(f"def {name}():\n    return {value}\n\n")
        room -= len(text)
        if room < 0:
            break
        filler.append(text)
    place = round(depth * len(filler))
    parts = [*filler[:place], planted, *filler[place:], question]
    return [*tokenizer.beginning, *(token for part in parts for token in part)], number
