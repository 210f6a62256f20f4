"""What the compiler makes of the Triton kernels for sm_90, with no GPU: no spills, wide loads, bounded registers.

Speed on a GPU depends on these, and no test of results can see them. The kernels compile in a separate process (see
triton_compiler), since in this one they may be interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# launch, kernel, most registers, least 16-byte loads and stores in a thread's code, products fused with sums. A
# multiprocessor has 65,536 registers: with 8 warps a program, 32 registers a thread fill it with 64 warps, 40 with 48,
# 48 with 40, 64 with 32, 80 with 24; with 4 warps a program, 96 fill it with 20.
BOUNDS = [
    ("norm", "rms_norm_forward_kernel", 40, 3, 2, 0),
    ("add and norm", "rms_norm_forward_kernel", 40, 5, 4, 0),
    ("norm backward", "rms_norm_backward_kernel", 64, 3, 1, 0),
    ("norm backward", "add_sums_kernel", 40, 4, 0, 0),
    ("add and norm backward", "rms_norm_backward_kernel", 64, 4, 1, 0),
    ("add and norm backward", "add_sums_kernel", 40, 4, 0, 0),
    ("rope", "rope_kernel", 32, 6, 2, 16),
    ("gather", "gather_unrotate_kernel", 32, 14, 6, 32),
    ("norm and rope", "norm_rope_forward_kernel", 48, 8, 2, 16),
    ("norm and rope backward", "norm_rope_backward_kernel", 96, 22, 6, 32),
    ("norm and rope backward", "add_sums_kernel", 40, 4, 0, 0),  # of queries, then of keys
    ("norm and rope backward", "add_sums_kernel", 40, 4, 0, 0),
    ("swiglu", "swiglu_forward_kernel", 32, 4, 2, 0),
    ("swiglu backward", "swiglu_backward_kernel", 64, 6, 6, 0),
    ("norm for fp8", "rms_norm_forward_kernel", 40, 5, 4, 0),
    ("norm backward for fp8", "rms_norm_backward_kernel", 64, 4, 1, 0),
    ("norm backward for fp8", "add_sums_kernel", 40, 4, 0, 0),
    ("gather for fp8", "gather_unrotate_kernel", 40, 14, 6, 32),
    ("norm and rope backward for fp8", "norm_rope_backward_kernel", 96, 22, 6, 32),
    ("norm and rope backward for fp8", "add_sums_kernel", 40, 4, 0, 0),
    ("norm and rope backward for fp8", "add_sums_kernel", 40, 4, 0, 0),
    ("swiglu for fp8", "swiglu_forward_kernel", 32, 4, 2, 0),
    ("swiglu backward for fp8", "swiglu_backward_kernel", 64, 6, 4, 0),
    ("cross entropy", "softmax_kernel", 64, 16, 8, 12),
    ("softmax", "softmax_kernel", 64, 16, 8, 12),
    ("rescale", "rescale_subtract_kernel", 40, 4, 4, 0),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, tests / "triton_compiler.py"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_and_launch_has_a_row(compiled):
    assert set(compiled["kernels"]) == {kernel for _, kernel, *_ in BOUNDS}
    assert [(r["launch"], r["kernel"]) for r in compiled["reports"]] == [row[:2] for row in BOUNDS]


@pytest.mark.parametrize(("launch", "kernel", "registers", "loads", "stores", "fused"), BOUNDS)
def test_machine_code(launch, kernel, registers, loads, stores, fused, compiled):
    report = next(r for r in compiled["reports"] if (r["launch"], r["kernel"]) == (launch, kernel))
    assert (report["stack"], report["local"], report["local_accesses"]) == (0, 0, 0), "registers spill"
    assert report["registers"] <= registers
    assert report["loads"].count(128) >= loads, f"loads of {report['loads']} bits"
    assert report["stores"].count(128) >= stores, f"stores of {report['stores']} bits"
    assert report["fused"] == fused, "it may be other products in another variant of the kernel: results would differ"
