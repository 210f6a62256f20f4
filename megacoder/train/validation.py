"""Held-out losses during training: the same windows every time, plain next-token prediction, no fill-in-the-middle.

Each held-out set has a loss of its own, so that one language getting worse does not hide behind the others. Of several
sets, the held-out loss is the mean of theirs, each counting the same however many tokens it has.

No token counts twice: after one pass of a set its windows are padded, and batches of padding alone are left out.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacoder.data.conversation_stream import ConversationStream
from megacoder.data.fim import FimConfig
from megacoder.data.sidecar import open_dataset
from megacoder.data.stream import Batch, TokenStream
from megacoder.data.tokenizer import Tokenizer
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import failing_together, gather_json
from megacoder.train.config import RunConfig
from megacoder.train.engine import Engine
from megacoder.train.metrics_log import HELD_OUT_LOSS
from megacoder.train.setup import open_conversations

__all__ = ["HeldOut", "describe_losses", "set_names"]


class HeldOut:
    """The first `eval_batches` global batches of each set in `data.valid`, fewer of a set with fewer tokens, split over
    the data-parallel ranks."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> None:
        """All ranks make one at the same time."""
        self.micro_batch_size = config.micro_batch_size
        self.batches: dict[str, list[Batch]] = {}
        with failing_together(mesh.world):
            for name, prefix in zip(set_names(config.data.valid), config.data.valid, strict=True):
                stream = _open(config, prefix, tokenizer, dp_rank=mesh.place.dp, dp_size=mesh.dims.dp)
                self.batches[name] = _first_batches(stream, config.eval_batches)
        self.num_tokens: dict[str, int] = {}
        """that an evaluation predicts, over all ranks"""
        self._leave_out_padding(mesh)

    def _leave_out_padding(self, mesh: Mesh) -> None:
        """Leaves out batches without labels on any rank, which is for all ranks to find out together."""
        ours = {
            name: [int((batch.labels != IGNORE_INDEX).sum()) for batch in batches]
            for name, batches in self.batches.items()
        }
        replicas = [counts for counts in gather_json(ours if mesh.speaks_for_replica else None, mesh.world) if counts]
        for name, batches in self.batches.items():
            sums = [sum(counts) for counts in zip(*(replica[name] for replica in replicas), strict=True)]
            self.batches[name] = [batch for batch, tokens in zip(batches, sums, strict=True) if tokens]
            self.num_tokens[name] = sum(sums)

    def losses(self, engine: Engine) -> dict[str, float]:
        """Nats per token over all ranks, by their names in metrics: HELD_OUT_LOSS, and one for each of several sets."""
        sets = {f"{HELD_OUT_LOSS}/{name}": self._loss(engine, batches) for name, batches in self.batches.items()}
        mean = statistics.fmean(sets.values())
        return {HELD_OUT_LOSS: mean, **sets} if len(sets) > 1 else {HELD_OUT_LOSS: mean}

    def record(self, losses: dict[str, float]) -> dict[str, Any] | None:
        """What a checkpoint keeps of `losses`, by which `keep_best` judges it; None if that is not finite."""
        loss = losses[HELD_OUT_LOSS]
        return {"loss": loss, "tokens": self.num_tokens} if math.isfinite(loss) else None

    def _loss(self, engine: Engine, batches: Sequence[Batch]) -> float:
        total, num_tokens = 0.0, 0.0
        for batch in batches:
            part = engine.evaluate(engine.microbatches(batch, self.micro_batch_size))
            sums = engine.sum_losses(part)
            total, num_tokens = total + sums[0], num_tokens + sums[1]
        return total / max(1.0, num_tokens)


def _first_batches(stream: TokenStream | ConversationStream, count: int) -> list[Batch]:
    """Batches without a label are alike: they are one and the same, so that they take no memory however many."""
    batches: list[Batch] = []
    padding: Batch | None = None
    for _ in range(count):
        batch = stream.next_batch()
        if not bool((batch.labels != IGNORE_INDEX).any()):
            batch = padding = padding or batch
        batches.append(batch)
    return batches


def set_names(prefixes: Sequence[Path]) -> list[str]:
    """What the sets are called: each the last part of its path, or as many of the last parts as no other set has."""

    def last(depth: int) -> list[str]:
        return ["/".join(prefix.parts[-depth:]) for prefix in prefixes]

    depths = range(1, 1 + max((len(prefix.parts) for prefix in prefixes), default=0))
    return [
        next(names[number] for names in map(last, depths) if names.count(names[number]) == 1)
        for number in range(len(prefixes))
    ]


def describe_losses(losses: dict[str, float]) -> str:
    """`HeldOut.losses` for a person to read."""
    sets = [f"{name.partition('/')[2]} {loss:.4f}" for name, loss in losses.items() if name != HELD_OUT_LOSS]
    return f"{losses[HELD_OUT_LOSS]:.4f}" + (f" ({', '.join(sets)})" if sets else "")


def _open(
    config: RunConfig, prefix: Path, tokenizer: Tokenizer, *, dp_rank: int, dp_size: int
) -> TokenStream | ConversationStream:
    """One pass of a set."""
    if config.data.conversations.valid:
        return open_conversations(config, prefix, tokenizer, dp_rank=dp_rank, dp_size=dp_size, epochs=1)
    plain = dataclasses.replace(config.data.stream, fim=FimConfig(rate=0.0))
    return TokenStream(
        [open_dataset(prefix, tokenizer)], tokenizer, plain,
        global_batch_size=config.global_batch_size, dp_rank=dp_rank, dp_size=dp_size, epochs=1,
    )  # fmt: skip
