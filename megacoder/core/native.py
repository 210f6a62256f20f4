"""The compiled CPU kernels (csrc/cpp), which are optional; whoever asks has a path of its own without them.

Here, beside nothing that loads torch, since workers that never compute need them too.
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
