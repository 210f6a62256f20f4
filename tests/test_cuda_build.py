"""What nvcc makes of csrc/cuda, checked without a GPU: no spills, few registers, wide loads, every launcher exported.

setup.py is run as an install runs it, with a stand-in for pybind11 (which only builds have) and no C++ compiler: the
CPU kernels are not what is built here.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megacoder.core import device
from megacoder.ops import cuda

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
STAND_IN = """
from setuptools import Extension

class Pybind11Extension(Extension):
    def __init__(self, *args, cxx_std, **kwargs):
        super().__init__(*args, **kwargs)
"""

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")


class Row(NamedTuple):
    registers: int
    """at most; 64 leave an SM four blocks of 256 threads"""
    wide: int
    """instances of the kernel with 128-bit loads"""


KERNELS = {
    "adamw_kernel": Row(registers=48, wide=3),  # one for each kind of weight
    "adamw_scalars_kernel": Row(registers=64, wide=0),
    "amax_kernel": Row(registers=40, wide=1),
    "cast_transpose_kernel": Row(registers=80, wide=2),  # of four: two formats, for even sizes and for odd ones
    "partial_sums_kernel": Row(registers=64, wide=2),  # fp32 and bf16
    "total_kernel": Row(registers=64, wide=0),
}


def nvcc_build(folder: Path, **environment: str) -> tuple[Path, list[str]]:
    """Where `setup.py build_ext` puts the library, and the lines that it prints about it."""
    (folder / "pybind11").mkdir()
    (folder / "pybind11" / "__init__.py").touch()
    (folder / "pybind11" / "setup_helpers.py").write_text(STAND_IN)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(folder), "CC": "false", "CXX": "false", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder / "lib" / "megacoder" / "_cuda.so", [line for line in done.stdout.splitlines() if "_cuda" in line]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    pytest.importorskip("setuptools")
    path, lines = nvcc_build(tmp_path_factory.mktemp("build"))
    assert path.exists(), lines
    assert lines == []
    return path


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.stem)
def compiled(request, tmp_path_factory):
    """One source's machine code for sm_90, and what the assembler says of it."""
    cubin = tmp_path_factory.mktemp("cubin") / f"{request.param.stem}.cubin"
    done = subprocess.run(
        ["nvcc", "-O3", "-std=c++17", "-cubin", "-arch=sm_90", "-Xptxas=-v", "-Werror=all-warnings", "-o", cubin,
         request.param],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return request.param, cubin, done.stderr


def kernel_of(mangled: str) -> str:
    """The table's name for a mangled one; a kernel without a row fails here."""
    found = [name for name in KERNELS if f"{len(name)}{name}" in mangled]
    assert len(found) == 1, f"{mangled} has no row in KERNELS"
    return found[0]


def test_every_row_has_its_kernel():
    declared = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", all_sources())
    assert sorted(declared) == sorted(KERNELS)


@needs_nvcc
def test_no_spills_and_few_registers(compiled):
    _, _, report = compiled
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(entries) == report.count("Compiling entry function") > 0
    for mangled, *memory, registers in entries:
        assert memory == ["0", "0", "0"], f"{mangled}: stack frame, spill stores and loads in bytes {memory}"
        assert int(registers) <= KERNELS[kernel_of(mangled)].registers, mangled


@needs_nvcc
def test_loads_are_128_bits_wide(compiled):
    source, cubin, _ = compiled
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH or in triton")
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ["PATH"]])  # it runs nvdisasm
    sass = subprocess.run(
        [cuobjdump, "--dump-sass", cubin], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout
    wide: dict[str, int] = {}
    for function in sass.split("Function : ")[1:]:
        name = kernel_of(function.partition("\n")[0])
        wide[name] = wide.get(name, 0) + bool(re.search(r"LDG\.E(\.\w+)*\.128", function))
    assert wide == {name: row.wide for name, row in KERNELS.items() if name in source.read_text()}


def find_cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))


def all_sources() -> str:
    return "".join(source.read_text() for source in SOURCES)


def test_signatures_are_those_of_the_sources():
    """ctypes would pass a wrong argument without a word."""
    declared = {}
    for name, arguments in re.findall(r'^extern "C" int (\w+)\(([^)]*)\)', all_sources(), re.MULTILINE):
        kinds = {"*": cuda.P, "int64_t": cuda.N, "double": cuda.F}
        declared[name] = tuple(
            next(kind for sign, kind in kinds.items() if sign in argument) for argument in arguments.split(",")
        )
    assert declared == cuda.SIGNATURES


@needs_nvcc
def test_the_library_loads_and_answers_without_a_gpu(library, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here; tests/test_cuda_kernels.py launches on it")
    monkeypatch.setattr(cuda, "CUDA_LIBRARY", library)
    monkeypatch.setattr(cuda, "_load", cuda._load.__wrapped__)
    kernels = cuda._load()
    for name, kinds in cuda.SIGNATURES.items():
        with pytest.raises(RuntimeError, match=f"the CUDA kernel {name} was not launched: .*\\(error \\d+\\)"):
            kernels.launch(name, *[1 if kind is cuda.N else 0 for kind in kinds[:-1]], stream=0)


def test_the_machine_says_whether_they_are_built(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    assert device.cuda_kernels().startswith("not built")
    assert dict(device.describe_parts())["CUDA kernels"] == device.cuda_kernels()
    (tmp_path / "_cuda.so").write_text("no library")
    assert device.cuda_kernels().startswith("not loadable")


@needs_nvcc
def test_the_machine_says_that_they_are_built(library, monkeypatch):
    monkeypatch.setattr(device, "CUDA_LIBRARY", library)
    assert device.cuda_kernels().startswith("built")


def test_a_missing_library_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(cuda, "_load", cuda._load.__wrapped__)
    assert cuda._load() is None
    with pytest.raises(RuntimeError, match="the CUDA kernel amax is not built here"):
        cuda.amax(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(()))


def test_a_build_without_nvcc_says_so_in_one_line(tmp_path):
    pytest.importorskip("setuptools")
    path, lines = nvcc_build(tmp_path, PATH="", CUDA_HOME="")
    assert not path.exists()
    assert len(lines) == 1
    assert "no nvcc on PATH or in $CUDA_HOME/bin" in lines[0]


def test_a_failing_nvcc_is_one_line_and_the_build_continues(tmp_path):
    pytest.importorskip("setuptools")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: no such architecture' >&2\necho more >&2\nexit 3\n")
    nvcc.chmod(0o755)
    path, lines = nvcc_build(tmp_path, PATH="", CUDA_HOME=str(tmp_path))
    assert not path.exists()
    assert len(lines) == 1
    assert "nvcc exits with 3: nvcc fatal: no such architecture" in lines[0]


def test_a_library_built_from_other_sources_is_not_used(library, monkeypatch):
    monkeypatch.setattr(device, "CUDA_LIBRARY", library)
    monkeypatch.setattr(device, "LAUNCHERS_VERSION", device.LAUNCHERS_VERSION + 1)
    assert device.cuda_kernels().startswith("not loadable (built from other sources; install megacoder again)")
    with pytest.raises(OSError, match="built from other sources"):
        cuda.CudaKernels(library)
