"""Held-out loss during training: the same windows every time, plain next-token prediction, no fill-in-the-middle."""

import dataclasses

from megacoder.core.errors import ConfigError
from megacoder.data.conversation_stream import ConversationStream
from megacoder.data.fim import FimConfig
from megacoder.data.sidecar import open_dataset
from megacoder.data.stream import TokenStream
from megacoder.data.tokenizer import Tokenizer
from megacoder.parallel.mesh import Mesh
from megacoder.train.config import RunConfig
from megacoder.train.engine import Engine
from megacoder.train.step import open_conversations

__all__ = ["HeldOut"]


class HeldOut:
    """The first `eval_batches` global batches of the held-out data, split over the data-parallel ranks."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> None:
        if config.data.valid is None:
            raise ConfigError("data.valid is not set, so there is no held-out loss to measure")
        stream: TokenStream | ConversationStream
        if config.data.conversations.valid:
            stream = open_conversations(
                config, config.data.valid, tokenizer, dp_rank=mesh.place.dp, dp_size=mesh.dims.dp
            )
        else:
            plain = dataclasses.replace(config.data.stream, fim=FimConfig(rate=0.0))
            stream = TokenStream(
                [open_dataset(config.data.valid, tokenizer)], tokenizer, plain,
                global_batch_size=config.global_batch_size, dp_rank=mesh.place.dp, dp_size=mesh.dims.dp,
            )  # fmt: skip
        self.micro_batch_size = config.micro_batch_size
        self.batches = [stream.next_batch() for _ in range(config.eval_batches)]

    def loss(self, engine: Engine) -> float:
        """Mean loss over all ranks' tokens, nats."""
        total, num_tokens = 0.0, 0.0
        for batch in self.batches:
            part = engine.evaluate(engine.microbatches(batch, self.micro_batch_size))
            sums = engine.sum_losses(part)
            total, num_tokens = total + sums[0], num_tokens + sums[1]
        return total / max(1.0, num_tokens)
