"""Held-out loss during training: the same windows every time, plain next-token prediction, no fill-in-the-middle."""

import dataclasses

import torch

from megacoder.core.errors import ConfigError
from megacoder.data.fim import FimConfig
from megacoder.data.sidecar import open_dataset
from megacoder.data.stream import TokenStream
from megacoder.data.tokenizer import Tokenizer
from megacoder.model.stage import forward_loss
from megacoder.model.transformer import Transformer
from megacoder.parallel.collectives import World, all_reduce_sum
from megacoder.train.config import RunConfig

__all__ = ["HeldOut"]


class HeldOut:
    """The first `eval_batches` global batches of the held-out data, shared out over the data-parallel ranks."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, world: World) -> None:
        if config.data.valid is None:
            raise ConfigError("data.valid is not set, so there is no held-out loss to measure")
        plain = dataclasses.replace(config.data.stream, fim=FimConfig(rate=0.0))
        stream = TokenStream(
            open_dataset(config.data.valid, tokenizer), tokenizer, plain,
            global_batch_size=config.global_batch_size, dp_rank=world.rank, dp_size=world.size,
        )  # fmt: skip
        self.world, self.micro_batch_size = world, config.micro_batch_size
        self.batches = [stream.next_batch() for _ in range(config.eval_batches)]

    def loss(self, model: Transformer) -> float:
        """Mean loss over all ranks' tokens, nats."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for batch in self.batches:
            tokens, labels = batch.tokens.to(self.world.device), batch.labels.to(self.world.device)
            pairs = zip(tokens.split(self.micro_batch_size), labels.split(self.micro_batch_size), strict=True)
            for micro_tokens, micro_labels in pairs:
                loss = forward_loss(model, micro_tokens, micro_labels)
                sums += torch.stack([loss.total, loss.total.new_tensor(loss.num_tokens)])
        all_reduce_sum(sums, self.world.group)
        return (sums[0] / sums[1].clamp_min(1)).item()
