"""How much of the devices' arithmetic a run uses: model FLOPs, 6 per weight and token plus attention's.

Always with the name of the convention by which attention is counted, since published figures follow both, and always
per device. Recomputation takes time but its FLOPs do not count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megacoder.core.device import probe
from megacoder.model.config import ModelConfig
from megacoder.train.metrics_log import DEVICE_TFLOPS, MFU

__all__ = ["CONVENTIONS", "Utilization", "device_name", "utilization", "utilization_metrics", "utilizations"]

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


def utilizations(
    model: ModelConfig, seq_length: int, *, tokens_per_second: float, num_devices: int, device_peak: float
) -> list[Utilization]:
    """The `Utilization` in each convention; `tokens_per_second` is that of all devices."""
    return [
        utilization(
            model, seq_length, convention=convention, tokens_per_second=tokens_per_second, num_devices=num_devices,
            device_peak=device_peak,
        )
        for convention in CONVENTIONS
    ]  # fmt: skip


def utilization_metrics(used: Sequence[Utilization]) -> dict[str, float]:
    """For a run's log: a device's TFLOP/s, and its share of the device's peak where that is known (not NaN)."""
    rates = {f"{DEVICE_TFLOPS}/{use.convention}": use.device_flops / 1e12 for use in used}
    return rates | {f"{MFU}/{use.convention}": use.mfu for use in used if not math.isnan(use.mfu)}


def device_name(device: torch.device) -> str:
    """What `known_peak` looks up."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else probe().device_name
