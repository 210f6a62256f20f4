"""The license of a repository, from the files at its root, as SPDX names.

Recognized by phrases that no other license has, ignoring white space and case: a guide for filtering, not a legal
opinion. `LICENSE-A` beside `LICENSE-B` is a choice (`A OR B`); other licenses found together all apply (`A AND B`). A
license file with none of the phrases counts as `unknown`, no license file at all as `none`.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megacoder.core.config import nearest
from megacoder.core.errors import ConfigError
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.spdx import SPDX_NAMES

__all__ = ["LICENSE_BYTES", "LicenseFilter", "check_names", "is_license_file", "license_of", "license_of_text"]

LICENSE_BYTES = 1 << 16
"""As much of a license file as is looked at."""
_FILE = re.compile(
    r"(?:(?:un)?licen[cs]es?|copying|copyright|mit-licen[cs]e|gpl|lgpl)(?P<variant>[-_][a-z0-9+-]+(?:\.\d+)*|\.(?:lesser|lib|l?gpl\w*|apache\w*|mit|bsd))?",
    re.IGNORECASE,
)
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".html", "")
_GNU_VERSION = re.compile(r"version (\d)(?:\.(\d))?")

# searched for in the text in lower case with white space collapsed; the first match decides
_PHRASES: tuple[tuple[str, str], ...] = (
    ("apache license,? version 2\\.0|apache license version 2\\.0, january 2004", "Apache-2.0"),
    ("mozilla public license,? (?:version|v\\.) ?2\\.0", "MPL-2.0"),
    ("mozilla public license version 1\\.1", "MPL-1.1"),
    ("eclipse public license -? ?v ?2\\.0", "EPL-2.0"),
    ("eclipse public license -? ?v ?1\\.0", "EPL-1.0"),
    ("common development and distribution license", "CDDL-1.0"),
    ("boost software license - version 1\\.0", "BSL-1.0"),
    ("creative commons legal code cc0|cc0 1\\.0 universal", "CC0-1.0"),
    ("attribution-sharealike 4\\.0 international", "CC-BY-SA-4.0"),
    ("attribution 4\\.0 international", "CC-BY-4.0"),
    ("this is free and unencumbered software released into the public domain", "Unlicense"),
    ("do what the fuck you want to public license", "WTFPL"),
    ("the artistic license 2\\.0", "Artistic-2.0"),
    ("python software foundation license version 2", "PSF-2.0"),
    ("european union public licence", "EUPL-1.2"),
    ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee", "ISC"),
    ("permission to use, copy, modify, and distribute this software for any purpose with or without fee", "ISC"),
    (
        "this software is provided 'as-is', without any express or implied warranty\\. in no event will the authors",
        "Zlib",
    ),
    ("permission is hereby granted, free of charge, to any person obtaining a copy", "MIT"),
    ("redistributions in binary form must reproduce .*neither the name", "BSD-3-Clause"),
    ("redistributions in binary form must reproduce .*names? of .*may (?:not )?be used to endorse", "BSD-3-Clause"),
    ("redistributions in binary form must reproduce", "BSD-2-Clause"),
)
_COMPILED = tuple((re.compile(phrase), name) for phrase, name in _PHRASES)
_GNU = (("affero general public license", "AGPL"), ("lesser general public license", "LGPL"),
        ("library general public license", "LGPL"), ("general public license", "GPL"))  # fmt: skip
_GNU_USUAL = ("GPL-2.0", "GPL-3.0", "LGPL-2.1", "LGPL-3.0", "AGPL-3.0")
_SPDX = re.compile(r"spdx-license-identifier:\s*([\w.+-]+(?:\s+(?:or|and|with)\s+[\w.+-]+)*)", re.IGNORECASE)
_LOOKED_AT = 20_000
_TITLE = 600


@dataclass(frozen=True, kw_only=True)
class LicenseFilter:
    """The stage: keeps files whose repository has an allowed license. Names are compared ignoring case."""

    allow: tuple[str, ...]
    """SPDX names; `none` and `unknown` stand for repositories without a license and with an unrecognized one"""
    name: str = "license"

    def __call__(self, document: Document) -> Document | Dropped:
        allowed = {name.lower() for name in self.allow}
        if is_allowed(document.license or "none", allowed):
            return document
        return document.dropped(self.name, "licence not allowed", document.license or "none")


def check_names(allowed: Iterable[str]) -> None:
    """ConfigError for a name that no license file can be recognized as, which would allow nothing."""
    usual = {name.lower(): name for name in ("none", "unknown", *_GNU_USUAL, *sorted({name for _, name in _PHRASES}))}
    known = usual | {name.lower(): name for name in sorted({name for _, name in _GNU} | SPDX_NAMES)}
    for name in allowed:
        plain = name.lower()
        if plain in known or plain.removesuffix("+") in known or plain.startswith("licenseref-"):
            continue
        if re.fullmatch(r"(?:a|l)?gpl-\d\.\d", plain):  # of any version, as `_gnu` reads it
            continue
        begins = next((one for one in usual if one.startswith(f"{plain}-")), None)
        match = begins or nearest(plain, usual) or nearest(plain, known)
        hint = f"did you mean {known[match]!r}?" if match else "give SPDX names such as MIT, or none, or unknown"
        raise ConfigError(f"allow_licenses: no license is recognized as {name!r}; {hint}")


def is_allowed(expression: str, allowed: Collection[str]) -> bool:
    """Whether an expression such as `A OR B AND C` holds if the names in `allowed` (lower case) do."""
    return any(
        all(part.split(" with ")[0].strip(" ()") in allowed for part in choice.split(" and "))
        for choice in expression.lower().split(" or ")
    )


def is_license_file(name: str) -> bool:
    """Whether a file of this name, at the root of a repository, holds a license."""
    stem, suffix = _split(name)
    return suffix in _TEXT_SUFFIXES and _FILE.fullmatch(stem) is not None


def license_of(files: Iterable[tuple[str, str]]) -> str:
    """The license that a repository's license files, (name, text), state together."""
    choices: set[str] = set()
    others: set[str] = set()
    for name, text in files:
        match = _FILE.fullmatch(_split(name)[0])
        license_ = license_of_text(text)
        (choices if match and match["variant"] else others).add(license_)
    if {license_.partition("-")[0] for license_ in others | choices} == {"GPL", "LGPL"}:
        return next(
            license_ for license_ in sorted(others | choices) if license_.startswith("LGPL")
        )  # it builds on the GPL
    known = others - {"unknown"} or others
    together = " AND ".join(sorted(known))
    choice = " OR ".join(sorted(choices - set(known)))
    return " OR ".join(part for part in (together, choice) if part) or "none"


def license_of_text(text: str) -> str:
    """The SPDX name of a license text, or `unknown`."""
    plain = " ".join(text[:_LOOKED_AT].lower().replace('"', "'").split())
    if found := _SPDX.search(text[:_LOOKED_AT]):
        return found[1]
    title = _gnu(plain, within=_TITLE)  # the text of a GNU license names the others, and may quote shorter ones
    other = next((name for pattern, name in _COMPILED if pattern.search(plain)), None)
    return title or other or _gnu(plain, within=len(plain)) or "unknown"


def _gnu(plain: str, within: int) -> str | None:
    """The GNU license named first in the first `within` characters."""
    found = [(plain.find(phrase, 0, within), name) for phrase, name in _GNU]
    position, name = min(((at, name) for at, name in found if at >= 0), default=(-1, ""))
    if position < 0:
        return None
    version = _GNU_VERSION.search(plain, position)
    return f"{name}-{version[1]}.{version[2] or 0}" if version else name


def _split(name: str) -> tuple[str, str]:
    for suffix in _TEXT_SUFFIXES[:-1]:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)], suffix
    return name, ""
