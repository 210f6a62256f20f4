"""`megacoder ops`: which implementation of every op runs on this machine, and why the others do not."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.core.device import probe
from megacoder.ops.backends import op_states

__all__ = ["OpsConfig", "main"]


@dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """The backends of every op; the environment variable MEGACODER_OPS=OP=BACKEND,... chooses others."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if there is one"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of weights and activations"""
    json: bool = False
    """print JSON instead of a table"""


def main(argv: Sequence[str]) -> None:
    """Runs `megacoder ops`."""
    config = parse_args(OpsConfig, argv, prog="megacoder ops")
    device_type = probe().device_type if config.device == "auto" else config.device
    states = op_states(device_type, getattr(torch, config.dtype))
    if config.json:
        print(json.dumps([asdict(state) for state in states], indent=2))
        return
    rows = [
        [state.op if first else "", f"{'>' if state.chosen else ' '} {state.backend}", state.what, state.reason]
        for state, first in zip(states, _firsts([state.op for state in states]), strict=True)
    ]
    table(f"ops for {config.dtype} on {device_type} (> runs)", ["op", "backend", "what it is", "why"], rows)


def _firsts(names: list[str]) -> list[bool]:
    return [index == 0 or names[index - 1] != name for index, name in enumerate(names)]
