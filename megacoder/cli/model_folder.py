"""What the commands that run a model share: loading it from any kind of folder, room in it, and printing an answer."""

import atexit
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from megacoder.checkpoint.folders import CHECKPOINTS
from megacoder.checkpoint.huggingface import read_config
from megacoder.checkpoint.manifest import MANIFEST
from megacoder.checkpoint.reader import CheckpointReader, open_together
from megacoder.cli.loading import Loading
from megacoder.core.config import from_dict
from megacoder.core.console import say_once
from megacoder.core.device import probe
from megacoder.core.errors import ConfigError, alike_on_all_ranks
from megacoder.data.chat_format import FormatConfig
from megacoder.data.folder_settings import chat_template_in, end_ids_in
from megacoder.data.tokenizer import Tokenizer
from megacoder.evaluate.generate import generate
from megacoder.evaluate.prompts import SHORTEST_COMPLETION
from megacoder.evaluate.sampling import Sampling
from megacoder.evaluate.stops import StopStrings
from megacoder.model.conversion import TOKENIZER, model_of
from megacoder.model.huggingface import import_with_tokenizer
from megacoder.model.transformer import Transformer
from megacoder.parallel.tensor import ALONE, TensorParallel
from megacoder.parallel.world import World, start_world
from megacoder.train.fragments import load_weights
from megacoder.train.launch import launch_workers

__all__ = [
    "answer_room", "chat_format_of", "is_checkpoint", "load_model", "print_answer", "prompt_room", "share_model",
    "tokenizer_of", "tuned_format_of",
]  # fmt: skip

_DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(folder: Path, loading: Loading, *, tp: TensorParallel) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a Hugging Face folder, a run or a checkpoint of any layout; on a GPU if there is one.

    A checkpoint's weights are fp32. Its tokenizer is the run's unless given; its `end_ids` are completed. Where ranks
    share the model, each loads its part, all of the same checkpoint.
    """
    tokenizer, dtype = loading.tokenizer, _DTYPES[loading.dtype]
    with alike_on_all_ranks():
        if is_checkpoint(folder):
            world = World(tp.rank, tp.size, 0, torch.device(probe().device_type), tp.group)
            return _load_checkpoint(open_together(folder, world), dtype or torch.float32, tokenizer, tp)
        read_config(folder)  # first, so that a folder without a model is reported as such
        if tokenizer is None and not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"{folder}: no tokenizer.json in it; name a folder that has one with --tokenizer")
        device = probe().device_type
        model, loaded = import_with_tokenizer(folder, dtype=dtype, device=device, tp=tp, tokenizer_folder=tokenizer)
        loaded.end_ids.update(end_ids_in(folder))
        return model, loaded


def _load_checkpoint(
    reader: CheckpointReader, dtype: torch.dtype, tokenizer: Path | None, tp: TensorParallel
) -> tuple[Transformer, Tokenizer]:
    found = tokenizer or tokenizer_of(reader)
    if found is None:
        raise ConfigError(f"{reader.folder}: no tokenizer beside this checkpoint; give one with --tokenizer")
    model = Transformer(model_of(reader), tp)
    load_weights(model, reader)
    loaded = Tokenizer.load(found)
    loaded.end_ids.update(end_ids_in(found))
    return model.to(probe().device_type, dtype), loaded


def chat_format_of(folder: Path, *, tokenizer: Path | None = None) -> FormatConfig:
    """The format that the model in `folder` was tuned with, by its run or its chat template; else DeepSeek-Coder's.

    `tokenizer` is the tokenizer's folder where it is not the model's own.
    """
    with alike_on_all_ranks():
        places = [folder, tokenizer]
        if is_checkpoint(folder):
            reader = CheckpointReader(folder)
            if (tuned := tuned_format_of(reader)) is not None:
                return tuned
            places = [tokenizer or tokenizer_of(reader)]
        for place in filter(None, places):
            template = chat_template_in(place if place.is_dir() else place.parent)
            if template is not None:
                found = FormatConfig.from_jinja(template)
                if found is None:
                    say_once(f"{place}: a chat template of another form; asking in DeepSeek-Coder's format")
                return found or FormatConfig()
    return FormatConfig()


def tuned_format_of(reader: CheckpointReader) -> FormatConfig | None:
    """The format of the conversations that the run of a checkpoint was tuned on; None for other runs."""
    config = reader.state.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    found = data.get("conversations") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not found.get("train"):  # its format is a default then, used for nothing
        return None
    return from_dict(FormatConfig, found.get("format", {}), where=f"{reader.folder}: conversations.format")


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a run, a folder of checkpoints or a checkpoint, not a Hugging Face folder."""
    holds_steps = any(folder.glob(f"step-*/{MANIFEST}"))
    return (folder / CHECKPOINTS).is_dir() or (folder / MANIFEST).is_file() or holds_steps


def tokenizer_of(reader: CheckpointReader) -> Path | None:
    """The tokenizer beside an imported model's checkpoints, or that of the run."""
    beside = reader.folder.parent.parent / TOKENIZER
    if reader.folder.parent.name == CHECKPOINTS and (beside / "tokenizer.json").is_file():
        return beside
    config = reader.state.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    named = data.get("tokenizer") if isinstance(data, dict) else None
    return Path(named) if named else None


def share_model(tp: int, words: Sequence[str], *, timeout_seconds: float = 600.0) -> TensorParallel | None:
    """This rank's place among `tp`; if no ranks have been started, runs `megacoder WORDS` on new ones, returning None.

    Only the first rank prints. No rank waits for another longer than `timeout_seconds`.
    """
    if tp == 1:
        return ALONE
    if "WORLD_SIZE" not in os.environ:
        launch_workers(words, nproc=tp)
        return None
    world = start_world(probe().device_type, timeout_seconds=timeout_seconds)
    if world.size != tp:
        raise ConfigError(f"--tp {tp}, but {world.size} ranks were started")
    atexit.register(world.close)
    if not world.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    return TensorParallel(rank=world.rank, size=world.size, group=world.group)


def answer_room(model: Transformer, max_new_tokens: int | None, *, otherwise: int) -> int:
    """The longest answer in tokens: as asked for, else `otherwise`, or half the positions of a model with few."""
    if max_new_tokens is not None:
        return max_new_tokens
    return min(otherwise, model.config.max_position_embeddings // 2)


def prompt_room(model: Transformer, max_new_tokens: int, *, shortest: int = SHORTEST_COMPLETION) -> int:
    """Tokens that a prompt may have; ConfigError if the answer leaves fewer than `shortest`."""
    positions = model.config.max_position_embeddings
    if not 1 <= max_new_tokens <= positions - shortest:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens}: must be from 1 to {positions - shortest}; the model has {positions} "
            f"positions, of which a prompt takes at least {shortest}"
        )
    return positions - max_new_tokens


def print_answer(
    model: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int],
    stops: Sequence[str] = (), sampling: Sampling | None = None, name: str = "0",
) -> str:  # fmt: skip
    """Prints what the model continues `prompt` with as it comes, then a line break; returns it. See `generate`."""
    streamed = StopStrings(tokenizer, stops, lambda text: print(text, end="", flush=True))
    generate(
        model, [prompt], max_new_tokens=max_new_tokens, stop_ids=stop_ids, num_ids=tokenizer.vocab_size,
        sampling=sampling, names=[name], watcher=lambda _, tokens: streamed.add(tokens[-1]),
    )  # fmt: skip
    text = streamed.finish()
    print(flush=True)
    return text
