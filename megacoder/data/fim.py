"""Fill-in-the-middle per file, before packing, cut at characters, as a pure function of (seed, epoch, file).

A file is cut at two characters into prefix, middle and suffix, and becomes, by the paper's PSM order,

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

or, by SPM (variant 2 of gpt-neox), `<fim_begin> <fim_hole> suffix <fim_end> prefix middle <eos>`. The cuts are drawn
uniformly over the characters, ends included, so that any part may be empty. EOS ends the middle: it is what the model
learns to stop on.

Datasets hold ids, and a cut falls inside a token or changes how its neighbourhood tokenises. Decoding and re-encoding
the file would cost a hundred times the rest of the data path. But every line break is a token of its own, so lines
tokenise independently: only the one or two lines that are cut are decoded, cut and encoded again, and the result
equals encoding each part in full.

A file much longer than the model's context never shows its prefix, suffix and middle together: cut into windows, the
structure is lost (Bavarian et al., section 3). For short contexts `context_tokens` therefore cuts files at line borders
into parts that are drawn for and transformed each by itself.

Source: DeepSeek-Coder (arXiv:2401.14196, section 3.1.2): rate 0.5, PSM, document level; Bavarian et al.
(arXiv:2207.14255).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megacoder.core.errors import ConfigError, DataError
from megacoder.data.tokenizer import Tokenizer

__all__ = ["FillInTheMiddle", "FimConfig"]

_Runs = list[np.ndarray | list[int]]  # ids that follow each other


@dataclass(frozen=True, kw_only=True)
class FimConfig:
    """How many files become fill-in-the-middle examples, and of which kind."""

    rate: float = 0.5
    """share of files that are transformed, 0 to 1"""
    spm_rate: float = 0.0
    """share of the transformed files in suffix-prefix-middle order, 0 to 1; the paper uses none"""
    context_tokens: int | None = None
    """transform parts of a file of at most this many tokens (a longer line is a part); None takes files whole"""

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"fim.{name} = {value}: a share from 0 to 1")
        if self.context_tokens is not None and self.context_tokens < 1:
            raise ConfigError(f"fim.context_tokens = {self.context_tokens}: at least 1")


class FillInTheMiddle:
    """Transforms files of token ids; holds the tables that it looks ids up in and no other state."""

    def __init__(self, config: FimConfig, tokenizer: Tokenizer, *, seed: int) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._characters = tokenizer.characters_per_token()
        self._breaks_line = np.array([token in (b"\n", b"\r") for token in tokenizer.token_bytes])

    def __call__(self, tokens: np.ndarray, *, epoch: int, file: int) -> np.ndarray:
        """The file as it is seen in `epoch`: `tokens` itself, or its parts with sentinels and EOS, in the same dtype.

        `tokens` are the ids of one whole file, with or without EOS at the end; `file` is its number in the dataset.
        Neither order nor number of calls matters. An empty file stays as it is.
        """
        if self.config.rate == 0.0:
            return tokens
        limit = self.config.context_tokens
        if limit is None or len(tokens) <= limit:
            return self._transform(tokens, epoch=epoch, file=file, part=0)
        parts = enumerate(self._parts(tokens, limit))
        return np.concatenate([self._transform(part, epoch=epoch, file=file, part=index) for index, part in parts])

    def _parts(self, tokens: np.ndarray, limit: int) -> Iterator[np.ndarray]:
        """As many whole lines as fit into `limit` at a time, and one where that is longer; EOS stays with the last."""
        length = len(tokens) - int(tokens[-1] == self.tokenizer.eos_id)
        ends = np.unique(np.append(np.flatnonzero(self._breaks_line[tokens[:length]]) + 1, length))
        start = 0
        while start < length:
            last = max(int(np.searchsorted(ends, start + limit, side="right")) - 1, 0)
            if ends[last] <= start:
                last += 1
            stop = int(ends[last])
            yield tokens[start:stop] if stop < length else tokens[start:]
            start = stop

    def _transform(self, tokens: np.ndarray, *, epoch: int, file: int, part: int) -> np.ndarray:
        content = tokens[:-1] if len(tokens) and tokens[-1] == self.tokenizer.eos_id else tokens
        chosen, order, cut_a, cut_b = self._draw(epoch, file, part)
        if len(content) == 0 or chosen >= self.config.rate:
            return tokens
        ends = np.cumsum(self._characters[content], dtype=np.int64)  # characters up to and with each token
        cuts = [cut * (int(ends[-1]) + 1) >> 64 for cut in (cut_a, cut_b)]
        try:
            prefix, middle, suffix = self._split(content, ends, min(cuts), max(cuts))
        except UnicodeDecodeError:
            raise DataError(
                f"file {file} of the dataset is no UTF-8 in this tokenizer; made with another one?"
            ) from None
        ids = self.tokenizer
        begin, hole, end, eos = [ids.fim_begin_id], [ids.fim_hole_id], [ids.fim_end_id], [ids.eos_id]
        if order < self.config.spm_rate:
            runs = [begin, hole, *suffix, end, *prefix, *middle, eos]
        else:
            runs = [begin, *prefix, hole, *suffix, end, *middle, eos]
        return np.concatenate([np.asarray(run, dtype=tokens.dtype) for run in runs])

    def _draw(self, epoch: int, file: int, part: int) -> tuple[float, float, int, int]:
        """Two uniform numbers in [0, 1) and two in [0, 2^64), from raw bits: NumPy keeps those across versions."""
        key, counter = (np.array(words, dtype=np.uint64) for words in ([self.seed % 2**64, epoch], [0, 0, part, file]))
        chosen, order, cut_a, cut_b = np.random.Philox(key=key, counter=counter).random_raw(4).tolist()
        return (chosen >> 11) * 2.0**-53, (order >> 11) * 2.0**-53, cut_a, cut_b

    def _split(self, content: np.ndarray, ends: np.ndarray, first: int, last: int) -> tuple[_Runs, _Runs, _Runs]:
        """Prefix, middle and suffix, each as runs of ids; `first` <= `last` are the cuts in characters."""
        breaks = np.flatnonzero(self._breaks_line[content])
        line_a, line_b = _line_at(breaks, ends, first), _line_at(breaks, ends, last)
        text_a, cut_a = self._text(content, line_a), first - _characters_before(ends, line_a)
        text_b, cut_b = self._text(content, line_b), last - _characters_before(ends, line_b)
        encode = self.tokenizer.encode
        middle: _Runs
        if line_a == line_b:
            middle = [encode(text_a[cut_a:cut_b])]
        else:
            middle = [encode(text_a[cut_a:]), content[line_a.stop : line_b.start], encode(text_b[:cut_b])]
        return (
            [content[: line_a.start], encode(text_a[:cut_a])],
            middle,
            [encode(text_b[cut_b:]), content[line_b.stop :]],
        )

    def _text(self, content: np.ndarray, line: slice) -> str:
        return self.tokenizer.decode_bytes(content[line].tolist()).decode("utf-8")


def _line_at(breaks: np.ndarray, ends: np.ndarray, cut: int) -> slice:
    """The tokens of the line that a cut before character `cut` falls into, without the line breaks around it.

    `breaks` are the places of the line breaks. A cut right before one is at the end of the line that it closes, a cut
    right after one at the start of the next line, which may be empty.
    """
    token = np.searchsorted(ends, cut, side="right")  # the token in which character `cut` begins
    following = int(np.searchsorted(breaks, token))
    start = int(breaks[following - 1]) + 1 if following else 0
    stop = int(breaks[following]) if following < len(breaks) else len(ends)
    return slice(start, stop)


def _characters_before(ends: np.ndarray, line: slice) -> int:
    return int(ends[line.start - 1]) if line.start else 0
