"""Which implementation of an op runs: probed once, chosen by the tensor at hand, overridden by `MEGACODER_OPS`.

An op has several backends, in the order of `OPS`: the first that is available and supports the tensor's device and
dtype runs. `torch` supports every tensor. Only the ops ask (`backend`), nothing else in the library does.

    MEGACODER_OPS=attention=flash,rms_norm=torch     for one process and those it starts

A backend requested by name must support its input: otherwise there is an error, not a silent second choice.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from megacoder.core.config import did_you_mean
from megacoder.core.device import cuda_kernels
from megacoder.core.errors import ConfigError
from megacoder.core.native import native_state
from megacoder.ops import cpp

__all__ = ["OPS", "OpState", "asked_for", "backend", "candidates", "op_states", "parse_choices", "triton_module"]

ENVIRONMENT = "MEGACODER_OPS"

OPS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("cpp", "triton", "torch"),
    "rope": ("cpp", "triton", "torch"),
    "swiglu": ("cpp", "triton", "torch"),
    "cross_entropy": ("cpp", "triton", "torch"),
    "attention": ("amx", "cpp", "cudnn", "flash3", "flash4", "flash", "torch"),
    "weight_grad": ("amx", "cpp", "cublas", "apex", "torch"),
    "few_rows": ("cpp", "torch"),
    "decode": ("cpp", "torch"),
    "adamw": ("cpp", "cuda", "torch"),
    "fp8_cast": ("cuda", "torch"),
    "fp8_product": ("scaled_mm", "torch"),
}
"""Backends by op, best first."""

HALF_DTYPES = (torch.bfloat16, torch.float16)
STORAGE_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Backend:
    """Where an implementation comes from."""

    missing: Callable[[], str | None]
    """why it cannot run in this process at all, or None"""
    takes: Callable[[str, torch.dtype], bool]
    """whether it supports tensors of this device type and dtype"""
    what: str
    """for people"""


def _no_cpp() -> str | None:
    return None if cpp.is_built() else native_state()


def _no_amx() -> str | None:
    return _no_cpp() or (None if cpp.has_amx() else "not offered by this processor and its system")


def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _cannot_import(module: str) -> str | None:
    """Tries to: an installed module may not fit this torch, and must not stop a run that does not need it."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no GPU here"


def _no_cudnn() -> str | None:
    if reason := _no_gpu():
        return reason
    version = torch.backends.cudnn.version() or 0
    if version < 91500:  # older versions are slower than flash on Hopper, and give wrong gradients at some lengths
        return f"cuDNN {version} is older than 9.15"
    return None if torch.cuda.get_device_capability()[0] >= 9 else "needs Hopper (sm_90) or newer"


def _no_flash(package: str, generations: tuple[int, ...]) -> str | None:
    """`package` is the module that torch imports to run FlashAttention's newer kernels."""
    if reason := _no_gpu():
        return reason
    if torch.cuda.get_device_capability()[0] not in generations:
        return "does not support this GPU generation"
    return _cannot_import(package)


def _no_apex() -> str | None:
    return _no_gpu() or _cannot_import("fused_weight_gradient_mlp_cuda")


def _no_cuda() -> str | None:
    return _no_gpu() or (None if cuda_kernels() == "built" else cuda_kernels())


def _no_fp8() -> str | None:
    if reason := _no_gpu():
        return reason
    return None if torch.cuda.get_device_capability() >= (8, 9) else "needs Ada (sm_89), Hopper or newer"


def _triton_takes(device_type: str, dtype: torch.dtype) -> bool:
    # Interpreted on a CPU, for tests: a hundred thousand times slower, so only on request.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and "triton" in _asked().values()
    return (device_type == "cuda" or interpreted) and dtype in STORAGE_DTYPES


def _on(device_type: str, dtypes: tuple[torch.dtype, ...]) -> Callable[[str, torch.dtype], bool]:
    return lambda device, dtype: device == device_type and dtype in dtypes


_BACKENDS = {
    "cpp": _Backend(_no_cpp, _on("cpu", STORAGE_DTYPES), "fused C++ for CPUs (csrc/cpp)"),
    "amx": _Backend(_no_amx, _on("cpu", (torch.bfloat16,)), "C++ for CPUs that multiply tiles (csrc/cpp)"),
    "triton": _Backend(_no_triton, _triton_takes, "Triton (csrc/triton)"),
    "cuda": _Backend(_no_cuda, _on("cuda", STORAGE_DTYPES), "CUDA C++ (csrc/cuda)"),
    "cudnn": _Backend(_no_cudnn, _on("cuda", HALF_DTYPES), "cuDNN's attention, through torch"),
    "flash": _Backend(
        lambda: None, lambda device, dtype: device == "cpu" or (device == "cuda" and dtype in HALF_DTYPES),
        "FlashAttention-2, part of torch",
    ),
    "flash3": _Backend(
        partial(_no_flash, "flash_attn_interface", (9,)), _on("cuda", HALF_DTYPES),
        "FlashAttention-3, a separate package",
    ),
    "flash4": _Backend(
        partial(_no_flash, "flash_attn.cute.interface", (9, 10)), _on("cuda", HALF_DTYPES),
        "FlashAttention-4, the package flash-attn-4",
    ),
    "cublas": _Backend(_no_gpu, _on("cuda", HALF_DTYPES), "cuBLAS GEMM that accumulates in fp32"),
    "apex": _Backend(_no_apex, _on("cuda", HALF_DTYPES), "apex's GEMM that accumulates in fp32"),
    "scaled_mm": _Backend(_no_fp8, _on("cuda", (torch.bfloat16,)), "cuBLASLt's fp8 GEMMs"),
    "torch": _Backend(lambda: None, lambda device, dtype: True, "plain torch, the reference"),
}  # fmt: skip


def backend(op: str, tensor: Tensor, *, able: Callable[[str], bool] | None = None) -> str:
    """The backend of `op` that runs on `tensor`; `able` says whether a backend supports everything else it is given.

    ConfigError where `MEGACODER_OPS` names one that cannot run.
    """
    names = candidates(op, tensor.device.type, tensor.dtype)
    for name in names:
        if able is None or able(name):
            return name
    raise ConfigError(f"{ENVIRONMENT}: {op}={names[0]} does not support all of this run; remove it")


def asked_for(op: str) -> str | None:
    """The backend of `op` that `MEGACODER_OPS` names, if it names one."""
    return _asked().get(op)


@cache
def candidates(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends of `op` that support such tensors in this process, best first; ConfigError as for `backend`."""
    asked = _asked().get(op)
    names = OPS[op] if asked is None else (asked,)
    serving = tuple(name for name in names if _serves(name, device_type, dtype) is None)
    if not serving:
        reason = _serves(names[0], device_type, dtype)
        raise ConfigError(f"{ENVIRONMENT} asks for {op}={asked}: {reason}; {op} has {', '.join(OPS[op])}")
    return serving


def _serves(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot run on such tensors, or None."""
    if reason := _BACKENDS[name].missing():
        return reason
    if _BACKENDS[name].takes(device_type, dtype):
        return None
    return f"does not support {str(dtype).removeprefix('torch.')} on {device_type}"


def parse_choices(text: str) -> dict[str, str]:
    """`OP=BACKEND,...` as a table; ConfigError that suggests the nearest known name."""
    choices: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, equals, name = entry.partition("=")
        if not equals or op not in OPS:
            hint = did_you_mean(op, OPS) if equals else ": expected a list of OP=BACKEND"
            raise ConfigError(f"{ENVIRONMENT}: {entry!r}{hint}; ops: {', '.join(OPS)}")
        if name not in OPS[op]:
            raise ConfigError(f"{ENVIRONMENT}: {op} has no backend {name!r}; it has {', '.join(OPS[op])}")
        if choices.setdefault(op, name) != name:
            raise ConfigError(f"{ENVIRONMENT}: {op} is given twice, {choices[op]} and {name}")
    return choices


@dataclass(frozen=True)
class OpState:
    """One backend of one op, as `megacoder ops` shows it."""

    op: str
    backend: str
    what: str
    chosen: bool
    reason: str
    """why it runs, or why not"""


def op_states(device_type: str, dtype: torch.dtype) -> list[OpState]:
    """Every backend of every op, for such tensors."""
    states = []
    for op, names in OPS.items():
        chosen, *others = candidates(op, device_type, dtype)
        for name in names:
            reason = _serves(name, device_type, dtype)
            if name == chosen:
                reason = f"requested by {ENVIRONMENT}" if op in _asked() else "the first available"
            elif reason is None:
                reason = f"runs what {chosen} cannot" if name in others else "excluded by " + ENVIRONMENT
            states.append(OpState(op, name, _BACKENDS[name].what, name == chosen, reason))
    return states


def triton_module(name: str) -> ModuleType:
    """`megacoder.ops.triton_kernels.NAME`, imported on first use: triton takes a second to load."""
    return importlib.import_module(f"megacoder.ops.triton_kernels.{name}")


@cache
def _asked() -> dict[str, str]:
    return parse_choices(os.environ.get(ENVIRONMENT, ""))
