"""Secrets and personal data in texts: the user chooses to keep them, to redact them, or to drop the file.

Secrets are what Yelp's detect-secrets recognizes by form (keys and tokens of services, private keys, passwords in
URLs); its entropy detectors are not used, as they report hashes and test data. Personal data are e-mail addresses and
public IP addresses. Redacted text becomes `<KEY>`, `<EMAIL>` or `<IP_ADDRESS>`, as for StarCoder.
"""

import functools
import importlib.util
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from megacoder.core.errors import ConfigError
from megacoder.corpus.documents import Document, Dropped

__all__ = ["Handling", "PersonalData", "Secrets", "check_secrets_available", "personal_spans", "secret_spans"]

Handling = Literal["keep", "redact", "drop"]

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)", re.DOTALL
)
_NOT_BY_FORM = frozenset(
    {"Public IP (ipv4)", "Secret Keyword", "Base64 High Entropy String", "Hex High Entropy String", "Private Key"}
)
_GROUPED = "Basic Auth Credentials"  # only the password in a URL is the secret
_AROUND = " \t\r\n\"'`=:,;"  # what some patterns match around the secret
_EMAIL = re.compile(r"(?<![\w.+%-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_NOT_PERSONAL = re.compile(
    r"(?:^(?:no-?reply|git|root|user|foo|test|info|support)@|@(?:[\w.-]*\.)?example\.(?:com|org|net)$|@localhost)",
    re.IGNORECASE,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]|-\d)")
_PLACEHOLDERS = {"email": "<EMAIL>", "ip": "<IP_ADDRESS>", "key": "<KEY>"}

Span = tuple[int, int, str]
"""Start, end, and what it is: email, ip or key."""


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """The stage for keys and tokens."""

    handling: Handling
    name: str = "secrets"

    def __call__(self, document: Document) -> Document | Dropped:
        return _handled(document, secret_spans(document.text), self.handling, self.name, "holds a secret")


@dataclass(frozen=True, kw_only=True)
class PersonalData:
    """The stage for e-mail and IP addresses."""

    handling: Handling
    name: str = "personal data"

    def __call__(self, document: Document) -> Document | Dropped:
        return _handled(document, personal_spans(document.text), self.handling, self.name, "holds personal data")


def check_secrets_available() -> None:
    """ConfigError where the library is not installed."""
    if importlib.util.find_spec("detect_secrets") is None:
        raise ConfigError("secrets need the library detect-secrets; pip install 'megacoder[secrets]'")


def secret_spans(text: str) -> list[Span]:
    """Where the secrets of `text` are, in order, none overlapping."""
    spans = (
        [(found.start(), found.end(), "key") for found in _PRIVATE_KEY.finditer(text)] if "PRIVATE KEY" in text else []
    )
    for pattern, group in _secret_patterns():
        for found in pattern.finditer(text):
            secret = found[group].strip(_AROUND)
            start = text.index(secret, found.start(group))
            spans.append((start, start + len(secret), "key"))
    return _disjoint(spans)


def personal_spans(text: str) -> list[Span]:
    """Where e-mail addresses and public IP addresses of `text` are, in order."""
    spans: list[Span] = []
    if "@" in text:
        spans += [(m.start(), m.end(), "email") for m in _EMAIL.finditer(text) if not _NOT_PERSONAL.search(m[0])]
    spans += [(found.start(), found.end(), "ip") for found in _IPV4.finditer(text) if _is_public(found[0])]
    return _disjoint(spans)


@functools.cache
def _secret_patterns() -> tuple[tuple[re.Pattern[str], int], ...]:
    """(pattern, the group that is the secret)."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    detectors: list[tuple[str, Any]] = sorted(get_mapping_from_secret_type_to_class().items())
    chosen = [
        (kind, pattern) for kind, detector in detectors if kind not in _NOT_BY_FORM for pattern in detector().denylist
    ]
    return tuple((pattern, 1 if kind == _GROUPED else 0) for kind, pattern in chosen)


def _handled(document: Document, spans: list[Span], handling: Handling, stage: str, reason: str) -> Document | Dropped:
    if not spans:
        return document
    if handling == "drop":
        kinds = ", ".join(sorted({kind for _, _, kind in spans}))
        return document.dropped(stage, reason, f"{len(spans)} ({kinds})")
    parts, position = [], 0
    for start, end, kind in spans:
        parts += [document.text[position:start], _PLACEHOLDERS[kind]]
        position = end
    return replace(document, text="".join([*parts, document.text[position:]]))


def _disjoint(spans: Iterable[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
    return kept


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:  # a version number
        return False
    return address.is_global and not text.endswith((".0", ".0.0"))
