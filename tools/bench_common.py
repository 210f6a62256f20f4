"""What every benchmark of this folder records about itself: the machine, the versions, the commit."""

import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import megacoder
from megacoder.core.device import cpp_kernels, probe

__all__ = ["commit", "machine", "write_record"]


def commit() -> str:
    """The commit that ran, marked where the tree had changes; MEGACODER_COMMIT says it where only the tree is."""
    if said := os.environ.get("MEGACODER_COMMIT"):
        return said
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()


def machine(**more: str | int) -> dict[str, str | int]:
    """Where the figures come from; `more`, such as the versions of peers, joins what every tool records."""
    here = probe()
    return {
        "processor": here.device_name, "cores": here.num_cores, "system": platform.platform(),
        **({"driver": _driver(), "cudnn": torch.backends.cudnn.version() or 0} if here.device_type == "cuda" else {}),
        "python": platform.python_version(), "torch": torch.__version__, **more,
        "megacoder": megacoder.__version__, "commit": commit(), "kernels": cpp_kernels(),
    }  # fmt: skip


def _driver() -> str:
    """Of the GPU."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    except FileNotFoundError:
        return "unknown"


def write_record(path: Path, *, machine: dict[str, Any], options: Any, results: Any) -> None:
    """One JSON file: who measured, with which options (a dataclass; its paths say nothing elsewhere), what."""
    chosen = {key: str(value) for key, value in asdict(options).items() if not isinstance(value, Path)}
    record = {"machine": machine, "options": chosen, "results": results}
    path.write_text(json.dumps(record, indent=2) + "\n")
