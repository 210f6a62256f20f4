"""Quality screening: drops files that do not parse, that are unreadable, or that are one endless function.

How much of a file a grammar may fail to parse depends on the grammar: *strict* ones hardly ever fail on good code,
*lenient* ones (C before preprocessing, assembly, SQL and others with many dialects) do, and the rest lie between. The
shares were set on sources of Debian and PyPI so that under 2% of such files are dropped.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from megacoder.core.config import did_you_mean
from megacoder.core.errors import ConfigError
from megacoder.corpus.compilers import accepts
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.heuristics import HeuristicLimits, modularity, readability
from megacoder.corpus.syntax import SCREENED, parse

__all__ = ["Screening", "ScreeningConfig", "unscreened"]

STRICT = frozenset({
    "C#", "CMake", "Emacs Lisp", "Go", "Java", "Java Server Pages", "JavaScript", "JSON", "Jupyter Notebook", "Kotlin",
    "Lua", "PHP", "Python", "Ruby", "Rust", "Scala", "Shell", "YAML",
})  # fmt: skip
LENIENT = frozenset({"Assembly", "C", "C++", "CUDA", "F#", "Fortran", "HTML", "MATLAB", "Scheme", "SQL", "TCL", "TeX"})
_WITHOUT_FUNCTIONS = frozenset({"CSS", "HTML", "JSON", "Makefile", "SQL", "TeX", "XSLT", "YAML"})


@dataclass(frozen=True, kw_only=True)
class ScreeningConfig:
    """What files are screened for, after dedup."""

    syntax: Annotated[bool, tyro.conf.arg(aliases=["--screen-syntax"])] = True
    """drop files that do not parse"""
    strict_share: float = 0.01
    """largest share of bytes that may fail to parse, for grammars that hardly ever fail on good code"""
    usual_share: float = 0.1
    """the same for most grammars"""
    lenient_share: float = 0.25
    """the same for languages with many dialects"""
    off: tuple[str, ...] = ()
    """languages that are not parsed"""
    compilers: bool = False
    """where gofmt, node, luac, php, ruby or bash is installed, let it decide instead of the grammar; the corpus then
    depends on what is installed"""
    heuristics: bool = True
    """drop files by the limits below"""
    limits: HeuristicLimits = field(default_factory=HeuristicLimits)

    def __post_init__(self) -> None:
        for name in ("strict_share", "usual_share", "lenient_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"screening {name} = {getattr(self, name)}: must be between 0 and 1")
        for name in self.off:
            if name not in SCREENED:
                hint = did_you_mean(name, SCREENED)
                raise ConfigError(f"screening.off: {name!r}{hint} is not a language that is screened")

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self.syntax or self.heuristics

    def max_share(self, language: str) -> float:
        """Largest share of bytes that may fail to parse in this language."""
        if language in STRICT:
            return self.strict_share
        return self.lenient_share if language in LENIENT else self.usual_share


def unscreened(languages: Iterable[str], *, syntax: bool, off: Collection[str]) -> list[str]:
    """Those of `languages` whose files no parser has checked; `syntax` and `off` are those of `ScreeningConfig`."""
    return sorted(name for name in languages if not syntax or name in off or name not in SCREENED)


@dataclass(frozen=True, kw_only=True)
class Screening:
    """The stage."""

    config: ScreeningConfig
    name: str = "screening"

    def __call__(self, document: Document) -> Document | Dropped:
        reason, detail = self._judge(document)
        return document if reason is None else document.dropped(self.name, reason, detail)

    def _judge(self, document: Document) -> tuple[str | None, str | None]:
        config, text, language = self.config, document.text, document.language
        if config.heuristics and (reason := readability(text, config.limits)):
            return reason, None
        verdict = accepts(text, language) if config.compilers and config.syntax else None
        if verdict is False:
            return "compiler: syntax error", None
        num_lines = text.count("\n") + 1
        wanted = config.syntax and language not in config.off and verdict is None
        long = config.heuristics and num_lines >= config.limits.long_file_lines and language not in _WITHOUT_FUNCTIONS
        if not (wanted or long):
            return None, None
        limit = config.max_share(language)
        function_lines = config.limits.max_function_share * num_lines if long else math.inf
        parsed = parse(text, language, document.path, enough=limit, function_lines=function_lines)
        if parsed is None:
            return None, None
        if wanted and parsed.error_share > limit:
            return "syntax error", parsed.problem
        if long and parsed.tree is not None:
            return modularity(parsed.tree, num_lines, config.limits), None
        return None, None
