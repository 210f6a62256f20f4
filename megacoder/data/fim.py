"""Fill-in-the-middle per file, before packing, cut at characters, as a pure function of (seed, epoch, file).

A file is cut at two characters into prefix, middle and suffix, and becomes, by the paper's PSM order,

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

or, by SPM (variant 2 of gpt-neox), `<fim_begin> <fim_hole> suffix <fim_end> prefix middle <eos>`. The cuts are drawn
uniformly over the characters, ends included, so that any part may be empty. EOS ends the middle: from it the model
learns to stop. MSP, the masked spans of the paper's ablation (T5's objective), hides many short spans:

    <fim_begin> text <fim_hole> text <fim_hole> text <fim_end> span <fim_hole> span <eos>

which with a single span is PSM. What the paper leaves open there is chosen here: there are no further sentinels, so
spans are told apart by their order; density and length are T5's, in characters.

A file much longer than the model's context never shows its prefix, suffix and middle together: once cut into windows,
the structure is lost (Bavarian et al., section 3). For short contexts `context_tokens` therefore cuts files at line
borders into parts; each part has a draw of its own and is transformed by itself.

Source: DeepSeek-Coder (arXiv:2401.14196, section 3.1.2): rate 0.5, PSM, document level; Bavarian et al.
(arXiv:2207.14255); Raffel et al. (arXiv:1910.10683, section 3.3.4).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError, DataError, FormatError
from megacoder.data.cuts import CharacterCutter
from megacoder.data.permutation import draw_bits, draw_many_bits, key_of
from megacoder.data.tokenizer import Tokenizer

__all__ = ["FillInTheMiddle", "FimConfig", "masked_spans", "why_no_fim"]

_PATH_COMMENT = re.compile(r"(?:#+|//|--|/\*|\(\*|<!--|[%;']+|REM\b)\s*(.*?)\s*(?:\*/|\*\)|-->)?")
_PATH_TOKENS = 128  # a path comment is not longer


@dataclass(frozen=True, kw_only=True)
class FimConfig:
    """How many files become fill-in-the-middle examples, and of which kind."""

    rate: float = 0.5
    """share of files to transform, 0 to 1"""
    spm_rate: float = 0.0
    """share of the transformed files that are in suffix-prefix-middle order, in which `infill --spm` asks, 0 to 1; the
    paper has none"""
    msp_rate: float = 0.0
    """share of the transformed files that have masked spans instead, 0 to 1; 1 in the paper's ablation"""
    msp_density: float = 0.15
    """share of a file's characters that masked spans hide, above 0, at most 1"""
    msp_span: float = 10.0
    """mean characters of a masked span, at least 1"""
    context_tokens: int | None = None
    """transform parts of a file, of at most this many tokens each (or one longer line); None: whole files"""
    only: tuple[str, ...] = ()
    """suffixes or names of the files to transform, such as ".py" or "Makefile", read from the path comment that opens
    each file of a corpus; empty: all files, also those without one"""
    never: tuple[str, ...] = ()
    """suffixes or names of files not to transform"""

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate", "msp_rate"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"data.stream.fim.{name} = {value}: must be a share from 0 to 1")
        if self.spm_rate + self.msp_rate > 1.0:
            raise ConfigError(
                f"data.stream.fim.spm_rate = {self.spm_rate} and msp_rate = {self.msp_rate}: must be at most 1 together"
            )
        if not 0.0 < self.msp_density <= 1.0:
            raise ConfigError(f"data.stream.fim.msp_density = {self.msp_density}: must be a share above 0, at most 1")
        if not 1.0 <= self.msp_span < math.inf:
            raise ConfigError(f"data.stream.fim.msp_span = {self.msp_span}: must be finite and at least 1 character")
        check_at_least(self, 1, "context_tokens", prefix="data.stream.fim.")

    @property
    def suffix_first(self) -> bool:
        """Whether a model has seen files to fill in only with their suffix first, and is to be asked so."""
        return self.spm_rate == 1.0


class FillInTheMiddle:
    """Transforms files of token ids; holds no state that changes."""

    def __init__(self, config: FimConfig, cutter: CharacterCutter, *, seed: int) -> None:
        """ConfigError where files are to be transformed and the tokenizer does not allow for that."""
        self.config, self.tokenizer, self.seed = config, cutter.tokenizer, seed
        self._cutter = cutter
        if config.rate > 0 and (reason := why_no_fim(self.tokenizer)) is not None:
            raise ConfigError(f"data.stream.fim.rate = {config.rate}: {reason}, or set it to 0")

    def __call__(self, tokens: np.ndarray, *, epoch: int, file: int) -> np.ndarray:
        """The file as it is seen in `epoch`: `tokens` itself, or its parts with sentinels and EOS, in the same dtype.

        `tokens` are the ids of one complete file, with or without EOS at the end; `file` is its number in the dataset.
        Neither the order nor the number of calls matters. An empty file stays as it is.
        """
        if self.config.rate == 0.0 or not self._is_meant(tokens):
            return tokens
        limit = self.config.context_tokens
        if limit is None or len(tokens) <= limit:
            return self._transform(tokens, epoch=epoch, file=file, part=0)
        parts = enumerate(self._parts(tokens, limit))
        return np.concatenate([self._transform(part, epoch=epoch, file=file, part=index) for index, part in parts])

    def _parts(self, tokens: np.ndarray, limit: int) -> Iterator[np.ndarray]:
        """Parts of as many lines as fit into `limit`, or of one line that is longer; EOS stays with the last part."""
        length = len(tokens) - int(tokens[-1] == self.tokenizer.eos_id)
        ends = np.unique(np.append(np.flatnonzero(self._cutter.breaks_line[tokens[:length]]) + 1, length))
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
        key = key_of(self.seed, epoch, file, part)
        chosen, kind, *cut_bits = draw_bits(key, 4)
        if len(content) == 0 or _share(chosen) >= self.config.rate:
            return tokens
        ends = self._cutter.character_ends(content)
        characters = int(ends[-1])
        masks_spans = _share(kind) >= 1.0 - self.config.msp_rate
        if masks_spans:
            density, span = self.config.msp_density, self.config.msp_span
            cuts = masked_spans(characters, density=density, span=span, key=key_of(key, 1)).ravel()
        else:
            cuts = np.array(sorted(bits * (characters + 1) >> 64 for bits in cut_bits))
        try:
            parts = self._cutter.cut(content, ends, cuts)
        except DataError as error:
            raise DataError(f"file {file} of the dataset is {error}") from None
        runs = self._arrange(parts, spm=not masks_spans and _share(kind) < self.config.spm_rate)
        return np.concatenate([np.asarray(run, dtype=tokens.dtype) for run in runs])

    def _arrange(self, parts: list[list[np.ndarray]], *, spm: bool) -> list[np.ndarray | list[int]]:
        """Kept and hidden parts, which alternate in the text, between their sentinels."""
        ids = self.tokenizer
        begin, hole, end, eos = [ids.fim_begin_id], [ids.fim_hole_id], [ids.fim_end_id], [ids.eos_id]
        if spm:
            prefix, middle, suffix = parts
            return [begin, hole, *suffix, end, *prefix, *middle, eos]
        runs: list[np.ndarray | list[int]] = []
        for opening, group in ((begin, parts[0::2]), (end, parts[1::2])):
            for index, part in enumerate(group):
                runs += [hole if index else opening, *part]
        return [*runs, eos]

    def _is_meant(self, tokens: np.ndarray) -> bool:
        """Whether `only` and `never` let a file of this name be transformed."""
        config = self.config
        if not config.only and not config.never:
            return True
        name = self._name(tokens)
        names = {name, PurePosixPath(name).suffix}
        return (not config.only or not names.isdisjoint(config.only)) and names.isdisjoint(config.never)

    def _name(self, tokens: np.ndarray) -> str:
        """The last part of the path in the comment that opens the file, or nothing."""
        line, *others = re.split(r"[\r\n]", self.tokenizer.decode(tokens[:_PATH_TOKENS].tolist()), maxsplit=1)
        comment = _PATH_COMMENT.fullmatch(line) if others else None
        return PurePosixPath(comment[1]).name if comment else ""


def why_no_fim(tokenizer: Tokenizer) -> str | None:
    """What of `tokenizer` does not allow for fill-in-the-middle; None if it does."""
    try:
        for name in ("fim_begin", "fim_hole", "fim_end"):
            tokenizer.control_id(name)
    except FormatError as error:
        return str(error)
    return None


def masked_spans(characters: int, *, density: float, span: float, key: int) -> np.ndarray:
    """Where each masked span of a text of `characters` characters begins and ends: int64 (spans, 2).

    The share `density` of the characters, at least one, is in spans of `span` characters on average, which do not
    touch. The lengths of the spans and of the text between them are drawn, as sorted cuts.
    """
    hidden = min(max(round(characters * density), 1), characters)
    spans = min(max(round(hidden / span), 1), hidden, characters - hidden + 1)
    shares = (draw_many_bits(key, 2 * spans - 1) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    lengths = np.diff(_rising(shares[: spans - 1], hidden - spans), prepend=0, append=hidden - spans) + 1
    kept = characters - hidden - (spans - 1)  # without the one character between neighbouring spans
    starts = _rising(shares[spans - 1 :], kept) + np.arange(spans) + np.cumsum(lengths) - lengths
    return np.stack([starts, starts + lengths], axis=1)


def _rising(shares: np.ndarray, limit: int) -> np.ndarray:
    """Numbers from 0 to `limit`, inclusive, in rising order."""
    return np.sort((shares * (limit + 1)).astype(np.int64))


def _share(bits: int) -> float:
    """Uniform in [0, 1)."""
    return (bits >> 11) * 2.0**-53
