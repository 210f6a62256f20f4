"""What a device and its links can do by their data sheets, and the shares of that which training programs reach.

One set of shares serves all devices. It was fitted to published throughputs (`tools/check_plan.py --published` refits
it without each row in turn and reports the error on that row).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megacoder.core.config import did_you_mean, load_toml
from megacoder.core.errors import ConfigError
from megacoder.core.rates import DENSE_BF16_TFLOPS

__all__ = ["DEVICES", "Device", "Shares", "find_device"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, its node and its network; a TOML file with these keys describes your own."""

    name: str = "own"
    """as shown"""
    device_type: Literal["cuda", "cpu"] = "cuda"
    """whose code runs there, which decides what a rank holds"""
    matrix_tflops: float
    """dense bf16 products by the data sheet, TFLOP/s"""
    fp8_tflops: float | None = None
    """dense fp8 products; if unset, layers do not run in fp8 here"""
    memory_gb: float
    """of one device, 10^9 bytes"""
    reserved_gb: float = 4.0
    """part of that taken by drivers, communication libraries and fragmentation"""
    memory_gb_per_s: float
    """reads and writes of the device's memory"""
    devices_per_node: int = 8
    """number of devices connected at `node_gb_per_s`"""
    node_gb_per_s: float
    """from one device to the others of its node, one direction"""
    network_gb_per_s: float
    """out of a whole node, one direction"""
    node_latency_us: float = 5.0
    """before the first byte of an exchange in a node"""
    network_latency_us: float = 15.0
    """before the first byte of an exchange between nodes"""

    def __post_init__(self) -> None:
        for name in ("matrix_tflops", "memory_gb", "memory_gb_per_s", "devices_per_node",
                     "node_gb_per_s", "network_gb_per_s"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"device {self.name}: {name} = {getattr(self, name)}: must be positive")
        if not 0 <= self.reserved_gb < self.memory_gb:
            raise ConfigError(
                f"device {self.name}: reserved_gb = {self.reserved_gb}: must be at least 0 and below memory_gb = "
                f"{self.memory_gb}"
            )

    @property
    def room(self) -> float:
        """Bytes for a rank."""
        return (self.memory_gb - self.reserved_gb) * 1e9


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Which part of a data sheet's figure a training step reaches."""

    products: float = 0.60
    """of the matrix rate, in the linear layers"""
    fp8_products: float = 0.45
    """of the fp8 matrix rate, casts included"""
    attention: float = 0.20
    """of the matrix rate, in attention, forward and backward together"""
    copies: float = 0.85
    """of the memory's rate"""
    links: float = 0.85
    """of a link's rate"""
    hidden_exchange: float = 0.70
    """of tensor parallel exchanges, where a program overlaps them with products"""


_H100 = Device(
    name="h100", matrix_tflops=DENSE_BF16_TFLOPS["h100"], fp8_tflops=1978.9, memory_gb=85.9, memory_gb_per_s=3350.0,
    node_gb_per_s=450.0, network_gb_per_s=400.0,
)  # fmt: skip

DEVICES: dict[str, Device] = {
    "h100": _H100,
    "h800": replace(_H100, name="h800", node_gb_per_s=200.0),
    "h200": replace(_H100, name="h200", memory_gb=150.8, memory_gb_per_s=4800.0),
    "a100": Device(
        name="a100", matrix_tflops=DENSE_BF16_TFLOPS["a100"], memory_gb=85.9, memory_gb_per_s=2039.0,
        node_gb_per_s=300.0, network_gb_per_s=200.0,
    ),
    "cpu": Device(
        name="cpu", device_type="cpu", matrix_tflops=0.15, memory_gb=16.0, reserved_gb=2.0, memory_gb_per_s=20.0,
        devices_per_node=2, node_gb_per_s=5.0, network_gb_per_s=1.0, node_latency_us=50.0, network_latency_us=200.0,
    ),
}  # fmt: skip
"""By the names that `megacoder plan --device` takes: SXM boards with a 400 Gb/s adapter for each device (A100: 200
Gb/s), and half a socket of a CPU."""


def find_device(name: str) -> Device:
    """By its name, or described in a TOML file; ConfigError if there is neither."""
    if name in DEVICES:
        return DEVICES[name]
    if name.endswith(".toml"):
        return load_toml(Device, Path(name), absent={"name": Path(name).stem})
    hint = did_you_mean(name, DEVICES)
    raise ConfigError(f"unknown device {name!r}{hint}; known: {', '.join(DEVICES)}, or a TOML file that describes one")
