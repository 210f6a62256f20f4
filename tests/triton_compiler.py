"""Compiles every kernel for sm_90, on any machine, as its launcher would at the 1.3B model's shapes; QK-norm with the
heads of Qwen3-8B.

Run as a program it prints, as JSON, the names of all kernels and what the compiler made of each launch. The launchers
themselves run, on tensors without memory, so that a kernel is specialised as in training; only the last step, from the
compiled kernel to the GPU, is left out. Not for a process in which kernels are interpreted or launched.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megacoder.ops import triton_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
T, D, F, H, K, W = 32768, 2048, 5504, 16, 128, 32256
QUERIES, KEYS = 32, 8  # of Qwen3-8B; H and H would hide that the forward divides by their sum, here no power of two
C = 1040  # tokens of a chunk of logits
POSITIONS = 4096


class Sm90:
    """As much of a driver as compiling takes: the target, and the numbers of a device and a stream."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches():
    """(label, what launches it) for all launchers."""
    from megacoder.ops.triton_kernels.cross_entropy import cross_entropy_, rescale_subtract_, softmax_
    from megacoder.ops.triton_kernels.qk_norm import norm_rope_backward, norm_rope_forward
    from megacoder.ops.triton_kernels.rms_norm import rms_norm_backward, rms_norm_forward
    from megacoder.ops.triton_kernels.rope import gather_unrotate, rope_
    from megacoder.ops.triton_kernels.swiglu import swiglu_backward_, swiglu_forward

    rows, weight, gate_up = tensor(T, D), tensor(D), tensor(T, 2 * F)
    rstd, grad_weight = tensor(T, dtype=torch.float32), tensor(D, dtype=torch.float32)
    positions = tensor(T, dtype=torch.int64)
    tables = [tensor(POSITIONS, K // 2, dtype=torch.float32)] * 2
    heads = tensor(T // POSITIONS, POSITIONS, H, K).transpose(1, 2)
    scale, labels, owned = (tensor(C, dtype=dtype) for dtype in (torch.float32, torch.int64, torch.bool))
    yield "norm", lambda: rms_norm_forward(rows, weight, 1e-6)
    yield "add and norm", lambda: rms_norm_forward(rows, weight, 1e-6, rows)
    yield "norm backward", lambda: rms_norm_backward(rows, rows, weight, rstd, grad_weight_D=grad_weight)
    yield (
        "add and norm backward",
        lambda: rms_norm_backward(rows, rows, weight, rstd, grad_weight_D=grad_weight, grad_residual_TD=rows),
    )
    yield "rope", lambda: rope_(tensor(T, 3 * H * K), *tables, positions, num_rotated=2 * H, head_dim=K)
    yield "gather", lambda: gather_unrotate(heads, heads, heads, *tables, positions)
    norms, fused = (tensor(K), tensor(K), 1e-6), tensor(T, (QUERIES + 2 * KEYS) * K)
    queries, keys = (tensor(T // POSITIONS, POSITIONS, count, K).transpose(1, 2) for count in (QUERIES, KEYS))
    yield (
        "norm and rope",
        lambda: norm_rope_forward(fused, *norms, *tables, positions, num_heads=QUERIES, num_kv_heads=KEYS),
    )
    sums = {name: tensor(K, dtype=torch.float32) for name in ("grad_query_K", "grad_key_K")}
    yield (
        "norm and rope backward",
        lambda: norm_rope_backward(queries, keys, keys, fused, *norms, *tables, positions, **sums),
    )
    yield "swiglu", lambda: swiglu_forward(gate_up)
    yield "swiglu backward", lambda: swiglu_backward_(tensor(T, F), gate_up)
    amax = tensor(dtype=torch.float32)
    yield "norm for fp8", lambda: rms_norm_forward(rows, weight, 1e-6, rows, amax=amax)
    yield (
        "norm backward for fp8",
        lambda: rms_norm_backward(
            rows, rows, weight, rstd, grad_weight_D=grad_weight, grad_residual_TD=rows, amax=amax
        ),
    )
    yield "gather for fp8", lambda: gather_unrotate(heads, heads, heads, *tables, positions, amax=amax)
    yield (
        "norm and rope backward for fp8",
        lambda: norm_rope_backward(queries, keys, keys, fused, *norms, *tables, positions, **sums, amax=amax),
    )
    yield "swiglu for fp8", lambda: swiglu_forward(gate_up, amax=amax)
    yield (
        "swiglu backward for fp8",
        lambda: swiglu_backward_(tensor(T, F), gate_up, forms_activation=False, amax=amax),
    )
    yield "cross entropy", lambda: cross_entropy_(tensor(C, W), labels, vocab=32022)
    yield "softmax", lambda: softmax_(tensor(C, W // 2), vocab=W // 2)
    yield "rescale", lambda: rescale_subtract_(tensor(C, W // 2), scale, labels, owned)


def all_kernels():
    names = []
    for module in pkgutil.iter_modules(triton_kernels.__path__, triton_kernels.__name__ + "."):
        members = vars(importlib.import_module(module.name))
        names += [name for name, member in members.items() if isinstance(member, JITFunction) and "_kernel" in name]
    return sorted(names)


def inspect(compiled):
    """What the machine code uses, and how wide its accesses of global memory are, in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
        listing = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", "-sass", cubin.name],
            env=environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    report = {"registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"]}
    report["fused"] = len(re.findall(r"\bFFMA\b", listing))
    report["local_accesses"] = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    for name, mnemonic in (("loads", "LDG"), ("stores", "STG")):
        widths = [re.search(r"\.(128|64|U16|S16|U8|S8)\b", op) for op in re.findall(rf"\b{mnemonic}\.\S+", listing)]
        report[name] = [int(width[1].lstrip("US")) if width else 32 for width in widths]
    return report


def main():
    driver.set_active(Sm90())
    run, made, reports = JITFunction.run, [], []

    def compile_only(kernel, *args, grid, warmup, **options):
        made.append((kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    for label, launch in launches():
        launch()
        reports += [{"launch": label, "kernel": name, **inspect(compiled)} for name, compiled in made]
        made.clear()
    print(json.dumps({"kernels": all_kernels(), "reports": reports}))


if __name__ == "__main__":
    main()
