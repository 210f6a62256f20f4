"""Texts, datasets and a tokenizer that the tests of the data path share; trained once per test run, in a second."""

import functools
import json
import sysconfig
from pathlib import Path

import numpy as np

from megacoder.data.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import train_tokenizer

NASTY_TEXTS = [
    "",
    "\n",
    "\r\n\r\n",
    "x = 1\r\ny = 2\r",
    "\tif (a) {\n\t\treturn b;\n\t}\n",
    "Führer, naïve, e\u0301 and 中文字符 가각 with 👩‍👩‍👧 emoji 👍🏽",
    "\x00\x7f\ufeff\u2028\u2029 \u00a0\u3000",
    "<｜fim▁hole｜> <｜end▁of▁sentence｜> <pad> <|EOT|> in a string",
    "a" * 300,
    "1234567890 ١٢٣ Ⅻ ½",
]


@functools.cache
def source_texts(count: int = 30) -> tuple[str, ...]:
    """The first modules of the standard library, by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))[:count])


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(source_texts(12), vocab_size=1024)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_dataset(prefix: Path, documents, dtype=np.uint16) -> IndexedDataset:
    """`documents` are lists of sequences, which are lists of ids."""
    with IndexedDatasetWriter(prefix, dtype=dtype) as writer:
        for sequences in documents:
            writer.add_document([np.array(sequence, dtype=dtype) for sequence in sequences])
    return IndexedDataset(prefix)


def write_texts(prefix: Path, texts, tokenizer: Tokenizer) -> IndexedDataset:
    """Each text a document of one sequence, which EOS ends."""
    documents = ([[*tokenizer.encode(text), tokenizer.eos_id]] for text in texts)
    return write_dataset(prefix, documents, dtype=token_dtype(tokenizer.vocab_size))
