"""Checkpoints to Hugging Face folders and back, with no model in memory: weights are streamed a chunk at a time.

Training writes fp32 master weights and moments, in any layout; a Hugging Face folder holds the weights alone. A
checkpoint names its model in its state, as part of the run's configuration. `import_folder` makes a folder like a
run's: `checkpoints/` with one checkpoint of step 0, of weights alone, and `tokenizer/` beside it where the source has
one. The ids that end a text go with the tokenizer, which runs that start from the model, and exports, take over.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.folders import CHECKPOINTS
from megacoder.checkpoint.manifest import MANIFEST
from megacoder.checkpoint.offline import write_offline
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CHUNK_ELEMENTS, CheckpointReader
from megacoder.core.config import from_dict, to_dict
from megacoder.core.errors import CheckpointError, ConfigError
from megacoder.core.files import replacing_dir
from megacoder.data.chat_format import FormatConfig
from megacoder.data.folder_settings import GENERATION, end_ids_in
from megacoder.data.tokenizer_folder import read_tokenizer_files
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import check_vocabulary, open_folder, weight_shapes, write_folder

__all__ = ["TOKENIZER", "export_checkpoint", "import_folder", "model_of"]

TOKENIZER = "tokenizer"
"""Folder beside `checkpoints/` that holds an imported model's tokenizer."""

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def model_of(reader: CheckpointReader) -> ModelConfig:
    """The model of a checkpoint; CheckpointError where the state does not name it, or the tensors do not match it."""
    where = f"{reader.folder / MANIFEST}: state.config.model"
    config = reader.state.get("config")
    table = config.get("model") if isinstance(config, dict) else None
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: missing; without it the checkpoint's model is unknown")
    try:
        model = from_dict(ModelConfig, table, where=where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    shapes = weight_shapes(model)
    stored = {key: entry.shape for key, entry in reader.tensors().items()}
    for kind in sorted({"weight", *(kind for kind, _ in stored)}):
        for name in sorted(shapes.keys() | {name for other, name in stored if other == kind}):
            found, implied = stored.get((kind, name)), shapes.get(name)
            if found != implied:
                raise CheckpointError(
                    f"{reader.folder / MANIFEST}: {kind} of {name}: {_shape(found)}; state.config.model implies "
                    f"{_shape(implied)}"
                )
    return model


def export_checkpoint(
    reader: CheckpointReader,
    folder: Path,
    *,
    dtype: torch.dtype,
    tokenizer_folder: Path | None,
    chat: FormatConfig | None = None,
) -> ModelConfig:
    """Writes a checkpoint's weights as a Hugging Face folder; returns the model. Errors as `export_model`.

    `chat` is the format that the model was tuned with; None for other models.
    """
    config = model_of(reader)
    write_folder(
        folder, config, lambda name: reader.stream([reader.whole(name)]),
        dtype=dtype, tokenizer_folder=tokenizer_folder, chat=chat,
    )  # fmt: skip
    return config


def import_folder(
    source: Path, folder: Path, *, files: Callable[[ModelConfig], Mapping[str, str]] = lambda _: {}
) -> ModelConfig:
    """Makes `folder`, laid out like a run's, from a Hugging Face folder; returns the model.

    `files` gives further text files by name, which appear with the rest. Weights become fp32, which changes no value.
    FormatError as `open_folder`, or where the tokenizer's files are damaged or it has more ids than the model;
    ConfigError where `folder` exists.
    """
    if os.path.lexists(folder):  # a link that leads nowhere, too
        raise ConfigError(f"{folder} exists already; choose another folder, or remove it first")
    config, _, tensors = open_folder(source)
    with_tokenizer, end_ids = (source / "tokenizer.json").exists(), end_ids_in(source)
    if with_tokenizer:  # what export would refuse is refused now, not after the training
        tokenizer = read_tokenizer_files(source, max_length=config.max_position_embeddings)
        check_vocabulary(tokenizer.vocab_size, config, source)
    fragments = [_whole_weight(name, shape) for name, shape in weight_shapes(config).items()]

    def stream(wanted: Sequence[Fragment]) -> Iterator[Tensor]:
        for fragment in wanted:
            for rows in tensors.read_rows(fragment.name, CHUNK_ELEMENTS):
                yield rows.float().flatten()

    with replacing_dir(folder) as temporary:
        write_offline(
            temporary / CHECKPOINTS, 0, [fragments], stream,
            num_ranks=1, layout={"imported": source.name}, state={"config": {"model": to_dict(config)}},
        )  # fmt: skip
        if with_tokenizer:
            (temporary / TOKENIZER).mkdir()
            for name in _TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, temporary / TOKENIZER / name)
            if end_ids:
                (temporary / TOKENIZER / GENERATION).write_text(json.dumps({"eos_token_id": end_ids}) + "\n")
        for name, text in files(config).items():
            (temporary / name).write_text(text, encoding="utf-8")
    return config


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"shape {list(shape)}"


def _whole_weight(name: str, shape: tuple[int, ...]) -> Fragment:
    region = Box.whole(shape)
    return Fragment(
        name=name, kind="weight", global_shape=shape, region=region, start=0, stop=region.volume,
        data=torch.empty(region.volume, device="meta"),
    )  # fmt: skip
