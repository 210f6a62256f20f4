"""The compiled CPU kernels (csrc/cpp), which are optional: every caller also has a path without them.

This module does not load torch, since workers without torch need the kernels too.
"""

import functools
import importlib
from types import ModuleType

__all__ = ["native"]


@functools.cache
def native() -> ModuleType | None:
    """The extension module, None where it was not built."""
    try:
        return importlib.import_module("megacoder._cpp")
    except ImportError:
        return None
