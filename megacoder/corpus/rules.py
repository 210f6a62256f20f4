"""The paper's file filters, one small function each: a text in, a reason to drop it or None out.

All thresholds count characters, not bytes, and are strict as in section 2.1 of arXiv 2401.14196: a file with a mean
line of exactly 100 characters is kept. What the paper leaves open is decided here: a line ends at LF, CR or CRLF and
its end is not counted; alphabetic is `str.isalpha`; an empty file has no alphabetic share and gets a reason of its own;
visible text of HTML is that outside tags, comments, scripts and styles, white space collapsed as in a browser.
The paper publishes no filters for its natural language; Markdown and reStructuredText, whose lines may be paragraphs,
are limited as StarCoder2 limits Markdown (arXiv 2402.19173): the letters, and no line of 100,000 characters.

Lines and letters are counted in one pass (`text_counts.py`).
"""

import html
import re
from dataclasses import dataclass

from megacoder.core.config import check_at_least
from megacoder.core.errors import ConfigError
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.languages import TEXT_LANGUAGES
from megacoder.corpus.text_counts import LineCounts, line_counts

__all__ = [
    "PaperRules", "RuleThresholds", "alphabetic_share", "data_size", "html_visible_text", "line_lengths",
    "markup_line", "visible_text", "xml_declaration",
]  # fmt: skip

_MAX_LINE_OF_MARKUP = 100_000

# What is never closed extends to the end of the text, as in a browser, so that no place is scanned twice.
_REST_OF_TAG = r"""(?:[^>=]++|=\s*+(?:"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z))|=)*+(?:>|\Z)"""
_MARKUP = re.compile(
    rf"<(?:!--(?s:.*?)(?:-->|\Z)|(script|style)\b{_REST_OF_TAG}(?s:.*?)(?=</\1|\Z)|[a-zA-Z/!?]{_REST_OF_TAG})",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class RuleThresholds:
    """Limits of the file filters; the defaults are the paper's."""

    max_mean_line: float = 100
    """largest mean length of a file's lines, in characters"""
    max_line: int = 1000
    """largest length of any line, in characters"""
    min_alphabetic: float = 0.25
    """smallest share of characters that are letters"""
    html_min_visible_share: float = 0.20
    """smallest share of an HTML file that is visible text"""
    html_min_visible: int = 100
    """fewest characters of visible text in an HTML file"""
    data_min_chars: int = 50
    """fewest characters of a JSON or YAML file"""
    data_max_chars: int = 5000
    """most characters of a JSON or YAML file"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_mean_line", "max_line", "data_max_chars", prefix="rules.")
        check_at_least(self, 0, "html_min_visible", "data_min_chars", prefix="rules.")
        for name in ("min_alphabetic", "html_min_visible_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rules.{name} = {getattr(self, name)}: must be between 0 and 1")
        if self.data_min_chars > self.data_max_chars:
            raise ConfigError(
                f"rules.data_min_chars = {self.data_min_chars}: must be at most data_max_chars = {self.data_max_chars}"
            )


@dataclass(frozen=True, kw_only=True)
class PaperRules:
    """The stage: the first rule that a file breaks is its reason."""

    thresholds: RuleThresholds = RuleThresholds()
    name: str = "rules"

    def __call__(self, document: Document) -> Document | Dropped:
        reason = self.reason(document.text, document.language)
        return document if reason is None else document.dropped(self.name, reason)

    def reason(self, text: str, language: str) -> str | None:
        """Why the paper drops a file with this text, or None."""
        limits = self.thresholds
        if not text or text.isspace():
            return "empty"
        counts = line_counts(text)
        reason = markup_line(text) if language in TEXT_LANGUAGES else line_lengths(counts, limits)
        reason = reason or alphabetic_share(counts, len(text), limits)
        if reason is None and language != "XSLT":
            reason = xml_declaration(text)
        if reason is None and language == "HTML":
            reason = html_visible_text(text, limits)
        if reason is None and language in ("JSON", "YAML"):
            reason = data_size(text, limits)
        return reason


def line_lengths(counts: LineCounts, limits: RuleThresholds) -> str | None:
    """Drops files whose mean or longest line is too long."""
    if counts.in_lines > limits.max_mean_line * counts.lines:
        return f"mean line over {limits.max_mean_line:g} characters"
    if counts.longest > limits.max_line:
        return f"a line over {limits.max_line} characters"
    return None


def markup_line(text: str) -> str | None:
    """Drops markup with a line that is too long even where a line may be a paragraph; only LF ends a line."""
    longest = max(map(len, text.split("\n")))
    return f"a line over {_MAX_LINE_OF_MARKUP} characters" if longest > _MAX_LINE_OF_MARKUP else None


def alphabetic_share(counts: LineCounts, size: int, limits: RuleThresholds) -> str | None:
    """Drops files of `size` characters with too few letters."""
    if counts.letters / size < limits.min_alphabetic:
        return f"under {limits.min_alphabetic:.0%} letters"
    return None


def xml_declaration(text: str) -> str | None:
    """Drops XML under another language's name: its declaration within the first 100 characters."""
    return "XML declaration" if "<?xml version=" in text[:100] else None


def html_visible_text(text: str, limits: RuleThresholds) -> str | None:
    """Drops HTML that is mostly markup."""
    visible = len(visible_text(text))
    if visible < limits.html_min_visible:
        return f"HTML with under {limits.html_min_visible} visible characters"
    if visible / len(text) < limits.html_min_visible_share:  # at the limit, the quotient rounds to the limit itself
        return f"HTML under {limits.html_min_visible_share:.0%} visible"
    return None


def data_size(text: str, limits: RuleThresholds) -> str | None:
    """Keeps JSON and YAML files of moderate size only."""
    if not limits.data_min_chars <= len(text) <= limits.data_max_chars:
        return f"data file outside {limits.data_min_chars} to {limits.data_max_chars} characters"
    return None


def visible_text(markup: str) -> str:
    """The text that a browser would show, white space collapsed; linear in the input, whatever the markup."""
    return " ".join(html.unescape(_MARKUP.sub("", markup)).split())
