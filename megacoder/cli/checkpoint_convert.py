"""`megacoder checkpoint reshard`, `export` and `import`: checkpoints to other layouts, and to and from Hugging Face.

Each writes a new folder, completely or not at all, and holds only a chunk of a tensor in memory at a time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from megacoder.checkpoint.folders import checkpoint_of_step, checkpoints_in
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.cli.model_folder import tokenizer_of, tuned_format_of
from megacoder.core.config import parse_args, to_toml
from megacoder.core.console import say
from megacoder.core.errors import ConfigError, FormatError
from megacoder.data.fim import FimConfig, why_no_fim
from megacoder.data.stream import StreamConfig
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_extending import missing_controls
from megacoder.model.config import ModelConfig
from megacoder.model.conversion import TOKENIZER, export_checkpoint, import_folder
from megacoder.parallel.dims import ParallelDims
from megacoder.train.config import DataConfig, RunConfig
from megacoder.train.reshard import reshard

__all__ = ["ExportArgs", "ImportArgs", "ReshardArgs", "export_main", "import_main", "reshard_main"]

START = "train.toml"
"""In an imported folder: a run that starts from it."""


@dataclass(frozen=True, kw_only=True)
class ReshardArgs:
    """Rewrites a checkpoint as the ranks of another layout would have written it; without options, as one file."""

    src: Positional[Path]
    """a checkpoint, or a run or a folder of checkpoints: then its newest complete one"""
    dst: Positional[Path]
    """folder of checkpoints, or a run, to add the result to"""
    tp: int = 1
    """tensor-parallel ranks"""
    pp: int = 1
    """pipeline-parallel ranks"""
    dp: int = 1
    """data-parallel replicas, which share the optimizer state"""
    cp: int = 1
    """context-parallel ranks"""


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Writes a folder that transformers and vLLM load, tokenizer and chat template included.

    For llama.cpp, tools/convert_gguf.py converts it.
    """

    src: Positional[Path]
    """a checkpoint, or a run, an imported folder or a folder of checkpoints: then its newest complete one"""
    dst: Positional[Path]
    """folder to write"""
    step: int | None = None
    """step of the checkpoint to export; if unset, the newest"""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype of the exported weights; the master weights are fp32"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; if unset, the run's; a tuned model keeps the chat format of its run"""


@dataclass(frozen=True, kw_only=True)
class ImportArgs:
    """Makes a checkpoint from a Hugging Face folder, such as DeepSeek-Coder's, Qwen2.5-Coder's or Qwen3's."""

    src: Positional[Path]
    """folder with config.json and safetensors"""
    dst: Positional[Path]
    """folder to write"""


def reshard_main(argv: Sequence[str]) -> None:
    """Reshards one checkpoint."""
    args = parse_args(ReshardArgs, argv, prog="megacoder checkpoint reshard")
    reader = CheckpointReader(args.src)
    dims = ParallelDims(tp=args.tp, pp=args.pp, dp=args.dp, cp=args.cp)
    folder = reshard(reader, checkpoints_in(args.dst), dims)
    say(f"{folder}: step {reader.step} for {dims}, {dims.world_size} file{'s' if dims.world_size > 1 else ''}")


def export_main(argv: Sequence[str]) -> None:
    """Exports one checkpoint."""
    args = parse_args(ExportArgs, argv, prog="megacoder checkpoint export")
    if os.path.lexists(args.dst):  # a link that leads nowhere, too
        raise ConfigError(f"{args.dst} exists already; choose another folder, or remove it first")
    reader = CheckpointReader(args.src if args.step is None else checkpoint_of_step(args.src, args.step))
    tokenizer = args.tokenizer or tokenizer_of(reader)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    config = export_checkpoint(
        reader, args.dst, dtype=dtype, tokenizer_folder=tokenizer, chat=tuned_format_of(reader)
    )  # fmt: skip
    without = "" if tokenizer is not None else "; no tokenizer: give one with --tokenizer"
    if tokenizer is None and config.qkv_bias and not config.qk_norm:
        without += " (beside a Qwen2, which this is, transformers gives any that is put there later Qwen's splits)"
    say(f"{args.dst}: step {reader.step}, {config.num_params:,} parameters in {args.dtype}{without}")


def import_main(argv: Sequence[str]) -> None:
    """Imports one model."""
    args = parse_args(ImportArgs, argv, prog="megacoder checkpoint import")
    config = import_folder(args.src, args.dst, files=lambda model: {START: _start(args.src, args.dst, model)})
    without, wanted = "", "data.train"
    if (reason := _why_no_tokenizer(args.dst)) is not None:
        without = f"; {reason}"
        wanted += f", and data.tokenizer to a tokenizer with {config.vocab_size:,} ids or fewer"
        wanted += " (with more, also model.vocab_size),"
    start = args.dst / START
    say(
        f"{args.dst}: {config.num_params:,} parameters, {config.rope_words}{without}; to continue training, set "
        f"{wanted} in {start}"
    )
    if config.positions_advice:
        say(f"{args.dst}: {config.max_position_embeddings:,} positions{config.positions_advice}")


def _why_no_tokenizer(folder: Path) -> str | None:
    """Why training cannot use the tokenizer of an imported folder; None where it can."""
    if not (folder / TOKENIZER).is_dir():
        return "no tokenizer.json"
    try:
        Tokenizer.load(folder / TOKENIZER)
    except FormatError as error:
        return f"its tokenizer cannot be used here ({error})"
    return None


def _fim(source: Path) -> FimConfig:
    """The default, or none where the tokenizer of `source` does not allow for it."""
    try:
        reason = why_no_fim(Tokenizer.load(source))
    except FormatError:  # another one will be used
        reason = None
    return FimConfig() if reason is None else FimConfig(rate=0.0)


def _start(source: Path, folder: Path, model: ModelConfig) -> str:
    """A run of continued pre-training, all settings written out."""
    seq_length = min(StreamConfig().seq_length, model.max_position_embeddings)
    stream = StreamConfig(seq_length=seq_length, fim=_fim(source))
    tokenizer = folder / TOKENIZER if (source / "tokenizer.json").exists() else None
    data = DataConfig(train=(Path("data/train"),), tokenizer=tokenizer or Path("tokenizer"), stream=stream)
    config = RunConfig(output=Path("run"), init_from=folder, data=data, model=model, steps=10_000)  # beyond the warm-up
    wanted = "data.train to your data" if tokenizer else "data.train to your data and data.tokenizer to its tokenizer"
    return (
        f"# Continues training from the weights of {source}; set {wanted}.\n{_how_to_extend(source)}{to_toml(config)}"
    )


def _how_to_extend(source: Path) -> str:
    """A comment about what the tokenizer of `source` lacks; nothing where it lacks nothing or cannot be used here."""
    try:
        tokenizer = Tokenizer.load(source)
    except FormatError:
        return ""
    if not (missing := missing_controls(tokenizer)):
        return ""
    known = {text for name, text in tokenizer.control_texts.items() if name.startswith("fim_")}
    sentinels, chat = [text for text in missing if text in known], [text for text in missing if text not in known]
    lacks = [f"{', '.join(sentinels)} (fill-in-the-middle)"] if sentinels else []
    lacks += [f"{', '.join(chat)} (some chat formats, not ChatML)"] if chat else []
    rate = f", and data.stream.fim.rate ({FimConfig().rate} in the paper)" if sentinels else ""
    return (
        "# Its tokenizer lacks " + ";\n# ".join(lacks) + ". A run that uses any of these needs\n"
        f"#   megacoder tokenizer extend {source} --output NEW\n"
        f"# with data.tokenizer set to NEW, model.vocab_size to what that says{rate}.\n"
    )
