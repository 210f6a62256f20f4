"""How much of the devices' arithmetic a run uses: model FLOPs, 6 per weight and token plus attention's.

Always with the name of the convention by which attention is counted, since published figures follow both, and always
per device. Recomputation takes time but its FLOPs do not count.
"""

from dataclasses import dataclass

import torch

from megacoder.core.device import probe
from megacoder.model.config import ModelConfig

__all__ = ["CONVENTIONS", "Utilization", "device_name", "utilization"]

CONVENTIONS = {"full attention (PaLM)": False, "causal attention": True}
"""How the products of attention are counted: all of them, or the half that a causal mask leaves."""


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """Model FLOPs in one convention of counting attention."""

    convention: str
    flops_per_token: float
    device_flops: float
    """FLOP/s of each device"""
    mfu: float
    """share of the peak"""


def utilization(
    model: ModelConfig, seq_length: int, *, convention: str, tokens_per_second: float, num_devices: int,
    device_peak: float,
) -> Utilization:  # fmt: skip
    """Arithmetic alone; `tokens_per_second` is that of all devices."""
    per_token = model.training_flops_per_token(seq_length, causal=CONVENTIONS[convention])
    flops = per_token * tokens_per_second / num_devices
    return Utilization(convention=convention, flops_per_token=per_token, device_flops=flops, mfu=flops / device_peak)


def device_name(device: torch.device) -> str:
    """What `known_peak` looks up."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else probe().device_name
