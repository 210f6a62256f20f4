"""Compares what is done here with another model's tokenizer with what the `tokenizers` library does, on your texts.

    python tools/check_tokenizer.py FOLDER --input corpus/heldout

For every text its ids must be those of `tokenizers` for the same file, whose padding and truncation do not count, and
those that it has in a batch, and of fastokens, if `preprocess` would use it; and each part of it, cut at random
characters as for fill-in-the-middle, must have the ids that it has by itself. A text that spells out a control token is
not compared with `tokenizers`: it is one there, and text here. Texts that do not come back from their ids, such as
those that the tokenizer normalizes, are counted; what comes back is cut.

So it finds faults of what is done here on top of `tokenizers`, on texts like yours. It cannot find a fault of
`tokenizers` or of the file, such as one that was converted wrongly: that takes ids of the model's own program.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
from bench_common import run_tool
from tyro.conf import Positional

from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError
from megacoder.data.cuts import CharacterCutter
from megacoder.data.documents import DocumentReader, find_inputs
from megacoder.data.encoders import BatchEncoder, fast_encoder
from megacoder.data.tokenizer import Tokenizer

_CUTS = (2, 2, 8)  # of a text, anew each time
_MOST_SHOWN = 5
_SHORT = "x"  # beside a text in a batch


@dataclass(frozen=True, kw_only=True)
class Options:
    """Ids of a published tokenizer, held against those of the tokenizers library."""

    folder: Positional[Path]
    """the tokenizer's folder, or a model's"""
    input: tuple[Path, ...]
    """Parquet or JSONL files of texts, or folders of them"""
    text_key: str = "content"
    """column or JSON key of the text"""
    tokens: int = 1_000_000
    """stop after the text with which there are this many tokens; at least 1"""
    seed: int = 0
    """of the cuts"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"--tokens {self.tokens}: must be at least 1")


@dataclass
class Found:
    """What a comparison has seen."""

    texts: int = 0
    tokens: int = 0
    with_controls: int = 0
    """texts whose ids differ since a control token is spelled out in them"""
    changed: int = 0
    """texts that do not come back"""
    parts: int = 0
    """compared with their own ids"""
    differences: list[str] = field(default_factory=list)


def main() -> None:
    options = parse_args(Options, None, prog="tools/check_tokenizer.py")
    found = compare(options.folder, _texts(options), tokens=options.tokens, seed=options.seed)
    if not found.texts:
        raise ConfigError(f"--input {' '.join(map(str, options.input))}: no text in {options.text_key!r} to compare")
    names = ("texts", "tokens", "with_controls", "changed", "parts")
    rows = [[name.replace("_", " "), f"{getattr(found, name):,}"] for name in names]
    table("Published ids and ours", ["", "number"], [*rows, ["differences", f"{len(found.differences):,}"]])
    for line in found.differences[:_MOST_SHOWN]:
        say(line)
    if found.differences:
        raise SystemExit(1)


def compare(folder: Path, texts: Iterator[str], *, tokens: int, seed: int) -> Found:
    """FormatError where `folder` holds no tokenizer that can be used."""
    tokenizer, found, draw = Tokenizer.load(folder), Found(), np.random.default_rng(seed)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json" if folder.is_dir() else folder))
    theirs.no_padding()
    theirs.no_truncation()
    short = tokenizer.encode(_SHORT)
    fast, cutter = fast_encoder("auto", tokenizer, threads=1), CharacterCutter(tokenizer)
    for text in texts:
        ids = tokenizer.encode(text)
        found.texts, found.tokens = found.texts + 1, found.tokens + len(ids)
        if any(control in text for control in tokenizer.control_ids):
            found.with_controls += 1
        elif theirs.encode(tokenizer.spelled(text), add_special_tokens=False).ids != ids:
            found.differences.append(f"ids of {text[:40]!r}")
        if tokenizer.encode_batch([text, _SHORT]) != [ids, short]:
            found.differences.append(f"ids in a batch of {text[:40]!r}")
        if fast is not None and _ids_of(fast, text) != ids:
            found.differences.append(f"ids by fastokens of {text[:40]!r}")
        found.changed += tokenizer.decode(ids) != text
        _compare_parts(tokenizer, cutter, ids, draw, found)
        if found.tokens >= tokens:
            break
    return found


def _compare_parts(
    tokenizer: Tokenizer, cutter: CharacterCutter, ids: list[int], draw: np.random.Generator, found: Found
) -> None:
    text = tokenizer.decode(ids)
    if not ids or tokenizer.encode(text) != ids:  # such as a decomposed character behind one that NFC would join it to
        return
    content = np.array(ids)
    ends = cutter.character_ends(content)
    for number in _CUTS:
        cuts = np.sort(draw.integers(0, len(text) + 1, number))
        for runs, (start, stop) in zip(
            cutter.cut(content, ends, cuts), pairwise([0, *cuts.tolist(), len(text)]), strict=True
        ):
            found.parts += 1
            if np.concatenate(runs).tolist() != tokenizer.encode(text[start:stop]):
                found.differences.append(f"characters {start} to {stop} of {text[:40]!r}")


def _ids_of(encode: BatchEncoder, text: str) -> list[int]:
    return encode([text])[0].tolist()


def _texts(options: Options) -> Iterator[str]:
    for path in find_inputs(options.input):
        for document in DocumentReader(path, text_key=options.text_key):
            yield from document


if __name__ == "__main__":
    run_tool(main)
