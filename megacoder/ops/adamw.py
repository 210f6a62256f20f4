"""AdamW (arXiv:1711.05101) on flat fp32 buffers, and the gradient norm that precedes it.

State is three fp32 vectors (master weights, both moments); the model's own weights, in bf16 or fp32, are written in the
same pass. On a CPU the master weights of bf16 weights take only 16 more bits each (`megacoder.ops.split_master`).
`grad_scale` folds the division by the global number of tokens and the clipping into that pass too.

On a GPU with the compiled kernels, the scalars that change from step to step (`update_scalars`) are computed on the
device and stay there, including the decision to skip an update: once a step has read its loss and number of tokens,
which are arguments here, the device computes the norm and the new weights without waiting for the host.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megacoder.core.errors import ConfigError
from megacoder.ops import cuda
from megacoder.ops.backends import backend
from megacoder.ops.cpp import address, kernels
from megacoder.ops.split_master import join_master, split_master_

__all__ = [
    "AdamWConfig",
    "adamw_",
    "adamw_with_scalars_",
    "scalars_stay_on_device",
    "sum_of_squares",
    "update_scalars",
]

LARGEST_BETA = 0.99999
"""With a larger one a moment's decay, 1 - beta, would be less than 160 roundings of fp32."""
SMALLEST_EPS = 1e-37
"""A smaller one is not a normal number in fp32, and a weight without gradients might be divided by zero."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Hyper-parameters; the defaults are DeepSeek-Coder's (arXiv:2401.14196, 3.4; arXiv:2401.02954, 2.3)."""

    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the square root of the second moment"""
    weight_decay: float = 0.1
    """decoupled decay, applied to matrices and embeddings, not to norms and biases"""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) <= LARGEST_BETA:
                raise ConfigError(
                    f"optimizer.{name} = {getattr(self, name)}: must be at least 0 and at most {LARGEST_BETA}, since "
                    "the moments are fp32"
                )
        if not SMALLEST_EPS <= self.eps < math.inf:
            raise ConfigError(f"optimizer.eps = {self.eps}: must be finite and at least {SMALLEST_EPS}, as in fp32")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optimizer.weight_decay = {self.weight_decay}: must be at least 0 and finite")


def adamw_(
    weight: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    config: AdamWConfig,
    lr: float,
    step: int,
    grad_scale: float,
    decayed: bool,
) -> None:
    """One update of equal-length flat tensors; `step` counts from 1. `weight` receives the new master in its dtype.
    Not for weights for which `scalars_stay_on_device`, which take `adamw_with_scalars_`.

    `master` is fp32, or on a CPU int16: the lower half of master weights whose upper half is the bf16 `weight`.
    """
    name = backend("adamw", weight)
    assert name != "cuda", "adamw_with_scalars_ updates these weights"
    decay = config.weight_decay if decayed else 0.0
    correction1, correction2 = 1 - config.beta1**step, 1 - config.beta2**step
    split = master.dtype == torch.int16
    if name == "cpp":
        state = [address(t, torch.float32, weight.numel()) for t in (exp_avg, exp_avg_sq, grad)]
        numbers = (
            weight.numel(), grad_scale, lr, config.beta1, config.beta2, config.eps, decay, correction1, correction2,
        )  # fmt: skip
        if split:
            lower_half = address(master, torch.int16, weight.numel())
            kernels().adamw_split(lower_half, *state, address(weight, torch.bfloat16), *numbers)
            return
        whole = address(master, torch.float32, weight.numel())
        kernels().adamw(weight.dtype == torch.bfloat16, whole, *state, address(weight, weight.dtype), *numbers)
        return
    low, master = (master, join_master(weight, master)) if split else (None, master)
    scaled = grad * grad_scale
    exp_avg.lerp_(scaled, 1 - config.beta1)
    exp_avg_sq.mul_(config.beta2).addcmul_(scaled, scaled, value=1 - config.beta2)
    master.sub_(master, alpha=lr * decay)  # a factor 1 - lr * decay would be off by the same rounding in every step
    master.addcdiv_(exp_avg, (exp_avg_sq / correction2).sqrt_().add_(config.eps), value=-lr / correction1)
    if low is None:
        weight.copy_(master)
    else:
        split_master_(master, weight, low)


def scalars_stay_on_device(weight: Tensor) -> bool:
    """Whether `adamw_with_scalars_` updates `weight`, with what `update_scalars` computes, instead of `adamw_`."""
    return backend("adamw", weight) == "cuda"


def update_scalars(
    squares: Tensor,
    *,
    config: AdamWConfig,
    lr: float,
    num_updates: int,
    num_tokens: int,
    max_grad_norm: float,
    skip_above: float,
) -> tuple[Tensor, Tensor]:
    """(what `adamw_with_scalars_` reads, fp64 norm of the mean gradient), on the device of `squares`, without a wait.

    `squares` is the sum of squared gradient sums. Where it is not finite, the norm is infinite and the update skipped;
    the update is also skipped where the norm is above `skip_above`.
    """
    device = squares.device
    norm = squares.sqrt() / num_tokens
    norm = torch.where(norm.isfinite(), norm, math.inf)
    allowed = torch.where(norm > skip_above, math.inf, squares)  # the kernel skips what is not finite
    scalars = torch.empty(cuda.ADAMW_SCALARS, device=device)
    cuda.adamw_scalars(
        # Filled by kernels: a copy from the host would wait for the gradients' norm.
        allowed, torch.full((), num_tokens, dtype=torch.float64, device=device),
        torch.full((), lr, dtype=torch.float32, device=device),
        torch.full((), num_updates, dtype=torch.int64, device=device),
        max_grad_norm=max_grad_norm, beta1=config.beta1, beta2=config.beta2, scalars=scalars,
        norm=torch.empty_like(norm),  # infinite where the update is skipped; `norm` says more
    )  # fmt: skip
    return scalars, norm


def adamw_with_scalars_(
    weight: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    config: AdamWConfig,
    scalars: Tensor,
    decayed: bool,
) -> None:
    """`adamw_` by the backend "cuda" alone, with learning rate, step and scale in device memory."""
    cuda.adamw_cuda_(
        weight, master, exp_avg, exp_avg_sq, grad, scalars,
        beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay if decayed else 0.0,
    )  # fmt: skip


def sum_of_squares(values: Tensor) -> Tensor:
    """fp64 scalar; the order of summation does not depend on the number of threads."""
    name = backend("adamw", values) if values.dtype == torch.float32 else "torch"
    if name == "cuda":
        out = torch.empty((), dtype=torch.float64, device=values.device)
        cuda.sum_of_squares_cuda(values, out)
        return out
    if name == "cpp":
        return torch.tensor(
            kernels().sum_of_squares(address(values, torch.float32), values.numel()), dtype=torch.float64
        )
    return values.double().pow(2).sum()
