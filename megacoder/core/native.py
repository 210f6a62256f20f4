"""The compiled CPU kernels (csrc/cpp), which are optional: every caller also has a path without them.

This module does not load torch, since workers without torch need the kernels too.
"""

import functools
import importlib
from types import ModuleType

__all__ = ["INTERFACE", "native", "native_state"]

INTERFACE = 3
"""Raised together with that of csrc/cpp/module.cpp when a function is added or takes other arguments: an editable
install keeps what was compiled from older sources, which would be called wrongly."""


@functools.cache
def native() -> ModuleType | None:
    """The extension module; None where it was not built from these sources (`native_state` says why)."""
    try:
        module = importlib.import_module("megacoder._cpp")
    except ImportError:
        return None
    return module if getattr(module, "interface", None) == INTERFACE else None


def native_state() -> str:
    """Which compiled CPU kernels run here, or why none do."""
    if module := native():
        return f"{module.isa()}{' and amx' if module.has_amx() else ''}"
    try:
        importlib.import_module("megacoder._cpp")
    except ModuleNotFoundError:
        reason = "not built"
    except ImportError as error:
        reason = f"not loadable ({error})"
    else:
        reason = "built from other sources (install again)"
    return f"{reason}; the torch paths are used"
