"""Builds the optional C++ helpers; everything else is declared in pyproject.toml.

Without a compiler the install still succeeds: `optional=True` turns a failed build into a warning, and the package
then runs on its NumPy and torch paths (`megacoder --version --verbose` says which parts are built).
"""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megacoder", "megacoder.*"]),
    package_data={"megacoder": ["py.typed"]},
    ext_modules=[
        Pybind11Extension(
            "megacoder._cpp", ["csrc/cpp/module.cpp"], cxx_std=17, extra_compile_args=["-O3"], optional=True
        )
    ],
)
