"""Joins several `.bin/.idx` pairs, document after document, in memory that does not grow with them.

For preprocessing on many machines: each makes a dataset of its share of the input, and one machine merges them.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from megacoder.core.console import progress, say
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path
from megacoder.data.sidecar import Sidecar, checksum

__all__ = ["MergeConfig", "merge"]


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Joins .bin/.idx pairs of one tokenizer, in the order given."""

    prefixes: tyro.conf.Positional[tuple[Path, ...]]
    """paths of the pairs without .bin or .idx"""
    output: Path
    """prefix of the pair to write"""

    def __post_init__(self) -> None:
        if not self.prefixes:
            raise ConfigError("no datasets to merge; give their prefixes")


def merge(config: MergeConfig) -> IndexedDataset:
    """Writes the pair, and its description where all parts have one.

    Raises ConfigError for parts of different tokenizers or dtypes, and for an output that exists, DataError where it
    cannot be written; nothing is left of it then.
    """
    if idx_path(config.output).exists():
        raise ConfigError(f"{idx_path(config.output)}: exists; choose another --output, or remove it")
    sidecars = [Sidecar.read(prefix) for prefix in config.prefixes]
    parts = [IndexedDataset(prefix) for prefix in config.prefixes]
    first = config.prefixes[0]
    for prefix, part, sidecar in zip(config.prefixes, parts, sidecars, strict=True):
        if part.dtype != parts[0].dtype:
            raise ConfigError(f"{prefix}: tokens are {part.dtype}, those of {first} {parts[0].dtype}")
        if sidecar and sidecars[0] and sidecar.tokenizer != sidecars[0].tokenizer:
            raise ConfigError(
                f"{prefix}: made with the tokenizer {sidecar.tokenizer[:12]}, {first} with {sidecars[0].tokenizer[:12]}"
            )
    try:
        with (
            progress("merge", sum(part.num_tokens for part in parts)) as bar,
            IndexedDatasetWriter(config.output, dtype=parts[0].dtype) as writer,
        ):
            for part in parts:
                writer.append(part)
                bar.update(writer.num_tokens)
    except OSError as error:
        raise DataError(f"{error.filename or bin_path(config.output)}: {error.strerror or error}") from None
    _describe(config.output, [sidecar for sidecar in sidecars if sidecar], complete=all(sidecars))
    merged = IndexedDataset(config.output)
    say(f"{config.output}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")
    return merged


def _describe(output: Path, sidecars: list[Sidecar], *, complete: bool) -> None:
    if not complete:
        say(f"{output}: some parts do not record their tokenizer, so the output does not either")
        return
    keys = {(sidecar.text_key, sidecar.document_key) for sidecar in sidecars}
    text_key, document_key = keys.pop() if len(keys) == 1 else ("several", None)
    Sidecar(
        documents=sum(sidecar.documents for sidecar in sidecars),
        sequences=sum(sidecar.sequences for sidecar in sidecars),
        tokens=sum(sidecar.tokens for sidecar in sidecars),
        bytes=sum(sidecar.bytes for sidecar in sidecars),
        tokenizer=sidecars[0].tokenizer,
        text_key=text_key,
        document_key=document_key,
        controls=tuple(sorted(set[str].intersection(*({*sidecar.controls} for sidecar in sidecars)))),
        inputs=tuple(name for sidecar in sidecars for name in sidecar.inputs),
        checksum=checksum(output),
    ).write(output)
