"""fp32 master weights in two extra bytes each: the bf16 weights are their upper half, 16 more bits the rounding error.

A bf16 number is the upper 16 bits of an fp32 one. So the model's own weights, stored anyway, hold most of a master
weight; what is missing is the difference of the bit patterns, from -2^15 to 2^15. That range has one value too many for
16 bits: where the master weight lies half-way between two bf16 numbers and was rounded toward zero, its last bit is
given up, at most 2^-23 of its value. The joined master weight always rounds to the same bf16 weight again.

Compared with fp32 master weights beside the bf16 ones this saves two bytes per weight, both in memory and in what an
update reads and writes. IPEX also splits master weights, but truncates: there the model's weights err by twice as much.
"""

import torch
from torch import Tensor

__all__ = ["join_master", "split_master_"]


def join_master(weight: Tensor, low: Tensor) -> Tensor:
    """fp32 master weights of equally long bf16 `weight` and int16 `low`."""
    return _upper(weight).add_(low).view(torch.float32)


def split_master_(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Overwrites bf16 `weight` with fp32 `master`, rounded to nearest even, and int16 `low` with the remainder."""
    weight.copy_(master)
    low.copy_((master.view(torch.int32) - _upper(weight)).clamp_(max=torch.iinfo(torch.int16).max))


def _upper(weight: Tensor) -> Tensor:
    """Bit patterns of `weight` in fp32 (int32)."""
    return weight.float().view(torch.int32)
