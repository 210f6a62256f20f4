"""What every contender of `bench_parallel.py` is asked to do: the same model, the same tokens, the same update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Job", "Step", "clip_and_update"]

Step = Callable[[], float | None]
"""One update; the mean loss before it, on ranks that know it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's part of a row of the table."""

    row: Literal["tp", "pp", "dp"]
    """which axis has the two ranks"""
    rank: int
    variant: str = ""
    """what the contender lets one choose: a schedule, autocast"""
    dtype: str
    """of the weights: float32, bfloat16"""
    num_microbatches: int
    """of a step, all ranks together"""
    batch: int
    """sequences of a microbatch"""
    sequence: int
    """tokens of a sequence"""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layers_per_stage: tuple[int, ...] = ()
    """in a pipeline, first stage first"""
    lr: float = 1e-4
    max_grad_norm: float = 1.0

    @classmethod
    def from_json(cls, job: dict[str, Any]) -> "Job":
        """From the plain values that came down the pipe."""
        return cls(**{**job, "layers_per_stage": tuple(job["layers_per_stage"])})

    @property
    def num_tokens(self) -> int:
        """Of a step, all ranks together."""
        return self.num_microbatches * self.batch * self.sequence

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def microbatches(self) -> list[tuple[Tensor, Tensor]]:
        """(tokens, labels) of this rank, (batch, sequence) each; only data parallelism shares them out."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.num_microbatches, self.batch, self.sequence + 1)
        whole = torch.randint(0, self.vocab_size, shape, generator=generator)
        mine = whole[self.rank :: 2] if self.row == "dp" else whole
        return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in mine]


def clip_and_update(
    params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, job: Job, *, shared: bool = False
) -> None:
    """Clips by the norm of all gradients (of both ranks where the model is `shared`), updates, lets gradients go."""
    grads = [param.grad for param in params if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if shared:
        squares = norm.float().pow(2)
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
    torch.nn.utils.clip_grads_with_norm_(params, job.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
