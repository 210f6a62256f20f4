"""Shared by the tools of this folder: the record of machine, versions and commit, model shapes, errors in one line."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

import megacoder
from megacoder.core.device import probe
from megacoder.core.errors import MegacoderError
from megacoder.core.native import native_state
from megacoder.model.config import ModelConfig

__all__ = ["CPU_SHAPES", "append_record", "commit", "machine", "record_of", "run_tool", "write_record"]

CPU_SHAPES = {
    "101M": ModelConfig(
        vocab_size=32256, hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10,
        num_key_value_heads=10, head_dim=64, max_position_embeddings=1024, rope_theta=10000.0,
    ),
    "58M": ModelConfig(
        vocab_size=32256, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=1024, rope_theta=10000.0,
    ),
    "13M": ModelConfig(
        vocab_size=8192, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
        num_key_value_heads=5, head_dim=64, max_position_embeddings=1024, rope_theta=10000.0,
    ),
    "4M": ModelConfig(
        vocab_size=8192, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=48, max_position_embeddings=1024, rope_theta=10000.0,
    ),
}  # fmt: skip
"""Models that a CPU trains and generates with in seconds, by their parameters."""


def commit() -> str:
    """`git describe --dirty` of this tree, or MEGACODER_COMMIT where only a copy of the tree is at hand."""
    if given := os.environ.get("MEGACODER_COMMIT"):
        return given
    if shutil.which("git") is None:
        return "unknown"
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
        "megacoder": megacoder.__version__, "commit": commit(), "kernels": native_state(),
    }  # fmt: skip


def _driver() -> str:
    """The GPU's driver version."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    except FileNotFoundError:
        return "unknown"


def record_of(*, machine: dict[str, Any], options: Any, results: Any) -> dict[str, Any]:
    """Who measured, with which options (a dataclass; its paths say nothing elsewhere), what."""
    chosen = {key: str(value) for key, value in asdict(options).items() if not isinstance(value, Path)}
    return {"machine": machine, "options": chosen, "results": results}


def write_record(path: Path, **parts: Any) -> None:
    """One JSON file of `record_of` these."""
    path.write_text(json.dumps(record_of(**parts), indent=2) + "\n")


def append_record(path: Path, **parts: Any) -> None:
    """One line of JSON more, of these members; from the options, paths are left out."""
    parts["options"] = {key: value for key, value in parts["options"].items() if not isinstance(value, Path)}
    with path.open("a") as lines:
        lines.write(json.dumps(parts) + "\n")


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Exits with what `main` returns; an error in the input is one line that begins with the tool's name."""
    try:
        sys.exit(main())
    except MegacoderError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
