"""Builds the optional kernels, C++ for CPUs and CUDA for GPUs; everything else is declared in pyproject.toml.

Without a compiler the install still succeeds: `optional=True` turns a failed build into a warning, and the package
then runs on its torch paths (`megacoder --version --verbose` says which parts are built).
"""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# No -ffast-math: the kernels promise torch's rounding. Apple's clang has no OpenMP; there they run on one thread.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

# Machine code for A100 and for H100 and H200, and PTX from which the driver compiles for what comes after. The CUDA
# runtime is linked in, so that the library loads beside any torch, and where there is no GPU.
NVCC_FLAGS = [
    "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "--cudart=static", "--threads=0",
    "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]  # fmt: skip
CUDA = Extension(
    "megacoder._cuda", sorted(glob("csrc/cuda/*.cu")), depends=sorted(glob("csrc/cuda/*.cuh")), optional=True
)


class BuildKernels(build_ext):
    """Knows nvcc, which makes a plain shared object, `megacoder/_cuda.so`: no Python module, loaded through ctypes."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_cuda":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA.name:
            super().build_extension(ext)
            return
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc") or (home and shutil.which("nvcc", path=os.path.join(home, "bin")))
        if not nvcc:
            raise CompileError("no nvcc on PATH or in $CUDA_HOME/bin; on GPUs the torch paths are used")
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([nvcc, *NVCC_FLAGS, "-o", library, *ext.sources], capture_output=True, text=True)
        if done.returncode != 0:
            complaint = (done.stderr or done.stdout).strip().partition("\n")[0]
            raise CompileError(f"nvcc exits with {done.returncode}: {complaint}")


setup(
    packages=find_packages(include=["megacoder", "megacoder.*"]),
    package_data={"megacoder": ["py.typed"]},
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Pybind11Extension(
            "megacoder._cpp",
            sorted(glob("csrc/cpp/*.cpp")),
            depends=sorted([*glob("csrc/cpp/*.h"), *glob("csrc/cpp/*.inc")]),
            cxx_std=17,
            extra_compile_args=[*FLAGS, *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        ),
        CUDA,
    ],
)
