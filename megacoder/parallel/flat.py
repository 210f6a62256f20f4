"""All weights of a rank in one flat buffer, all gradients in another, every parameter a view of both.

The gradient buffer is fp32 whatever the weights' dtype: microbatches accumulate without rounding, and the buffer is
reduced over data-parallel ranks by one collective with no copying. Autograd adds into the same views
(`param.grad_dtype`), so the plain model and the hand-scheduled step share them.

Layout: parameters in the order given, each start aligned to ALIGNMENT elements, the end padded so that it divides by
the number of data-parallel ranks. The padding stays zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["FlatParameters", "FlatSlot"]

ALIGNMENT = 64
"""Elements; 128 bytes in bf16, so that every view starts on a cache line and a vector load."""


@dataclass(frozen=True)
class FlatSlot:
    """Where a parameter lives in the flat buffers: elements [start, start + numel)."""

    name: str
    param: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        """One past the parameter's last element."""
        return self.start + self.param.numel()


class FlatParameters:
    """Moves `parameters` into flat buffers; afterwards `weight` and `grad` are the memory behind every view."""

    weight: Tensor
    """all weights, `dtype`"""
    grad: Tensor
    """all gradients, fp32"""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_shards: int = 1,
    ) -> None:
        self.slots: list[FlatSlot] = []
        end = 0
        for name, param in parameters:
            self.slots.append(FlatSlot(name, param, end))
            end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
        unit = ALIGNMENT * num_shards
        self.numel = -(-end // unit) * unit
        self.num_shards = num_shards
        self.weight = torch.zeros(self.numel, dtype=dtype, device=device)
        self.grad = torch.zeros(self.numel, dtype=torch.float32, device=device)
        for slot in self.slots:
            param, shape = slot.param, slot.param.shape
            view = self.weight[slot.start : slot.stop].view(shape)
            view.copy_(param.detach())
            param.data = view
            param.grad_dtype = torch.float32
            param.grad = self.grad[slot.start : slot.stop].view(shape)

    def shard(self, index: int) -> slice:
        """The elements that data-parallel rank `index` updates."""
        size = self.numel // self.num_shards
        return slice(index * size, (index + 1) * size)
