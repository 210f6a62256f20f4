"""`megacoder checkpoint export RUN DST`: the weights of a run as a Hugging Face folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from megacoder.core.config import load_toml, parse_args
from megacoder.core.console import say
from megacoder.core.errors import ConfigError
from megacoder.model.huggingface import export_model
from megacoder.model.transformer import Transformer
from megacoder.train.config import RunConfig
from megacoder.train.run_folder import load_weights

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Writes a folder that transformers, vLLM and llama.cpp load, tokenizer included."""

    run: tyro.conf.Positional[Path]
    """output folder of a training run"""
    dst: tyro.conf.Positional[Path]
    """folder to write"""
    step: int | None = None
    """the checkpoint of this step; without, the newest"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the exported weights; the master weights are float32"""


def main(argv: Sequence[str]) -> None:
    """Exports one checkpoint."""
    args = parse_args(ExportArgs, argv, prog="megacoder checkpoint export")
    if args.dst.exists():
        raise ConfigError(f"{args.dst} exists already; choose another folder, or remove it first")
    config = load_toml(RunConfig, args.run / "run.toml")
    checkpoints = args.run / "checkpoints"
    model = Transformer(config.model)
    step = load_weights(model, checkpoints if args.step is None else checkpoints / f"step-{args.step:08d}")
    export_model(model, args.dst, dtype=getattr(torch, args.dtype), tokenizer_folder=config.data.tokenizer)
    say(f"{args.dst}: step {step}, {config.model.num_params:,} parameters in {args.dtype}")
