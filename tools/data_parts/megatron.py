"""megatron-core's `IndexedDataset`, without the rest of megatron-core.

Its module needs one function of the package around it, whose own import takes half a minute on a busy machine and
warns of a dozen libraries that are not there. So a stub replaces that package while the module is imported.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

__all__ = ["indexed_dataset"]


def indexed_dataset() -> Any:
    """The unchanged module `megatron.core.datasets.indexed_dataset`; ModuleNotFoundError if it is not installed."""
    found = importlib.util.find_spec("megatron")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("megatron-core is not installed")
    root = Path(next(iter(found.submodule_search_locations)))
    stand_ins = {
        "megatron.core": _package(root / "core"),
        "megatron.core.datasets": _package(root / "core" / "datasets"),
        "megatron.core.utils": types.ModuleType("megatron.core.utils"),
    }
    stand_ins["megatron.core.utils"].__dict__["log_single_rank"] = _log_nothing
    theirs = {name: sys.modules.pop(name) for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("megatron.core.datasets.indexed_dataset")
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(theirs)


def _package(folder: Path) -> types.ModuleType:
    module = types.ModuleType(folder.name)
    module.__path__ = [str(folder)]
    return module


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass
