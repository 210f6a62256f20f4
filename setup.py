"""Builds the optional CPU kernels; everything else is declared in pyproject.toml.

Without a compiler the install still succeeds: `optional=True` turns a failed build into a warning, and the package
then runs on its torch paths (`megacoder --version --verbose` says which parts are built).
"""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

# No -ffast-math: the kernels promise torch's rounding. Apple's clang has no OpenMP; there they run on one thread.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

setup(
    packages=find_packages(include=["megacoder", "megacoder.*"]),
    package_data={"megacoder": ["py.typed"]},
    ext_modules=[
        Pybind11Extension(
            "megacoder._cpp",
            sorted(glob("csrc/cpp/*.cpp")),
            depends=["csrc/cpp/kernels.h", "csrc/cpp/kernels.inc"],
            cxx_std=17,
            extra_compile_args=[*FLAGS, *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        )
    ],
)
