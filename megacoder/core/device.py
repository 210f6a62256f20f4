"""What this machine has: its device, the dtype that is faster on it, the optional parts built."""

import ctypes
import importlib
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megacoder.core.native import native_state
from megacoder.core.processes import num_cores

__all__ = [
    "CUDA_LIBRARY",
    "CUDA_MAJOR",
    "LAUNCHERS_VERSION",
    "Machine",
    "cuda_kernels",
    "describe_parts",
    "faster_dtype",
    "load_cuda_library",
    "probe",
]

CUDA_LIBRARY = Path(__file__).parents[1] / "_cuda.so"
"""Where setup.py puts the CUDA kernels"""
LAUNCHERS_VERSION = 1
"""Raised together with that of csrc/cuda/flat.cuh when a launcher's arguments change: older code would misread them."""

CUDA_MAJOR = 8
"""The least major compute capability that they are built for: A100 and later"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run can use here."""

    device_type: str
    """'cuda' or 'cpu'"""
    device_name: str
    """as the driver or the operating system names it"""
    num_devices: int
    """GPUs, or 1 for a CPU"""
    num_cores: int
    """processor cores that this process may use"""


def probe() -> Machine:
    """Probes the machine; where torch sees GPUs, this initializes CUDA."""
    cores = num_cores()
    if torch.cuda.is_available():
        name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
        return Machine(device_type="cuda", device_name=name, num_devices=count, num_cores=cores)
    return Machine(device_type="cpu", device_name=_cpu_name(), num_devices=1, num_cores=cores)


def faster_dtype(machine: Machine, *, rows: int = 2048, width: int = 512, trials: int = 25) -> torch.dtype:
    """bfloat16 where it multiplies matrices faster than float32 here, else float32; measured, about half a second.

    The two take turns and their best times are compared, so that a busy neighbour slows both or neither.
    Without hardware support (AVX-512 BF16, AMX, Arm BF16) a CPU emulates bfloat16 slower than float32.
    """
    if machine.device_type == "cuda":
        return torch.bfloat16
    factors = {
        dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(factors, float("inf"))
    for _ in range(trials):
        for dtype, (a, b) in factors.items():
            start = time.perf_counter()
            torch.mm(a, b)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return min(best, key=lambda dtype: best[dtype])


def cuda_kernels() -> str:
    """Whether compiled CUDA kernels run here, or why none do."""
    if not CUDA_LIBRARY.exists():
        return "not built (that takes nvcc when megacoder is installed); the torch paths are used"
    try:
        load_cuda_library(CUDA_LIBRARY)
    except OSError as error:
        return f"not loadable ({error}); the torch paths are used"
    if not torch.cuda.is_available():
        return "built; no GPU that torch can use"
    major, minor = torch.cuda.get_device_capability()
    if major < CUDA_MAJOR:
        return f"built for compute capability {CUDA_MAJOR}.0 and up; this GPU's is {major}.{minor}"
    return "built"


def load_cuda_library(path: Path) -> ctypes.CDLL:
    """The compiled CUDA kernels; OSError if they cannot be loaded, or were built from sources of another version."""
    library = ctypes.CDLL(str(path))
    version = getattr(library, "launchers_version", None)
    if version is None or version() != LAUNCHERS_VERSION:
        raise OSError("built from other sources; install megacoder again")
    return library


def describe_parts() -> list[tuple[str, str]]:
    """(part, state) rows for `megacoder --version --verbose`."""
    machine = probe()
    return [
        ("torch", torch.__version__),
        ("device", f"{machine.device_name} ({machine.num_devices} x {machine.device_type}, {machine.num_cores} cores)"),
        ("C++ kernels", native_state()),
        ("CUDA kernels", cuda_kernels()),
        ("transformers", "installed" if importlib.util.find_spec("transformers") else "not installed (optional)"),
    ]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()
