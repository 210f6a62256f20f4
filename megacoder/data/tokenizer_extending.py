"""The control tokens that a model's tokenizer lacks: a copy of its folder, with further ids behind the others.

No id moves and no text gets other ids, so the model's weights stay valid. The new ids need rows of the embedding and
the head: spare ones, which some models have, or those that a run adds to the weights that it starts from.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megacoder.core.console import say
from megacoder.core.errors import ConfigError, FormatError
from megacoder.core.files import replacing_dir
from megacoder.data.control_tokens import ADDED_NAMES
from megacoder.data.folder_settings import GENERATION, end_ids_in, num_rows_in
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_folder import extended_files, read_tokenizer_files

__all__ = ["extend_tokenizer", "missing_controls"]


def missing_controls(tokenizer: Tokenizer) -> list[str]:
    """The control tokens of fill-in-the-middle and chat that `tokenizer` lacks, in the order of their ids elsewhere."""
    texts = (tokenizer.control_texts[name] for name in ADDED_NAMES)
    return [text for text in texts if text.encode() not in tokenizer.token_bytes]


def extend_tokenizer(source: Path, output: Path, further: Sequence[str] = (), *, rows: int | None = None) -> None:
    """Writes `source`, a tokenizer folder or a model's, as `output` with the control tokens that it lacks, and says so.

    `further` are control tokens to add behind these, `rows` the ids that the model knows where no config.json beside
    the tokenizer says so. ConfigError where `output` exists, or one of them cannot be added; FormatError where
    `source` holds no byte-level tokenizer.
    """
    if os.path.lexists(output):  # a link that leads nowhere, too
        raise ConfigError(f"{output} exists already; choose another folder, or remove it first")
    base = Tokenizer.load(source)
    folder = source if source.is_dir() else source.parent
    missing = missing_controls(base)
    _check_further(further, base, missing)
    ids = {text: base.vocab_size + number for number, text in enumerate([*missing, *further])}
    if not ids:
        say(f"{source}: has all control tokens of fill-in-the-middle and chat already; {output} is not written")
        return
    size, rows = base.vocab_size + len(ids), rows or num_rows_in(folder)
    _write(folder, output, ids, base)
    for text, index in ids.items():
        say(f"{index}  {text}")
    if rows is not None and rows >= size:
        what = f"the {rows:,} rows of the model suffice: model.vocab_size = {rows}"
    else:
        what = f"a run that starts from the model adds its rows: model.vocab_size = {size}"
    unknown = ", or the model's own, if that is larger" if rows is None else ""
    say(f"{output}: {size:,} ids; {what}{unknown}")


def _check_further(further: Sequence[str], base: Tokenizer, missing: Sequence[str]) -> None:
    for number, text in enumerate(further):
        if not text:
            raise ConfigError("--add '': a token needs at least one character")
        if text in further[:number]:
            raise ConfigError(f"--add {text!r}: is given twice")
        if text in missing:
            raise ConfigError(f"--add {text!r}: is added in any case; leave it out")
        if text.encode() in base.token_bytes:
            raise ConfigError(
                f"--add {text!r}: the tokenizer has it already, as id {base.token_bytes.index(text.encode())}; "
                "leave it out"
            )
        if (index := base.token_id(text)) is not None:  # it would get this id, and change what that stands for
            raise ConfigError(
                f"--add {text!r}: is how the tokenizer's file spells id {index}, {base.decode([index])!r}; "
                "choose another string"
            )


def _write(folder: Path, output: Path, ids: dict[str, int], base: Tokenizer) -> None:
    found = read_tokenizer_files(folder, max_length=None)
    files = extended_files(found.files, ids, folder)
    if end_ids_in(folder):
        files[GENERATION] = json.dumps({"eos_token_id": found.ids["eos_token_id"]}) + "\n"
    with replacing_dir(output) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if Tokenizer.load(temporary).token_bytes != [*base.token_bytes, *(text.encode() for text in ids)]:
            raise FormatError(f"{folder}: with further tokens its ids stand for others; it cannot be extended")
