"""What every source does with a file: judge it by its name, decode it, settle its language.

A file is opened only if its name and size allow it. Text is UTF-8, UTF-16 or UTF-32 with a byte order mark, or what
the file itself declares: in a comment of its first lines (PEP 263, editors' mode lines), or as HTML, XML, JSP and CSS
do. An `encoding=` in code says nothing of the file that holds it. Other files are dropped unless a fallback is given.
"""

import codecs
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacoder.corpus.ambiguous import candidate_languages, settled_language
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.languages import CODE_LANGUAGES, language_of

__all__ = ["NOT_WALKED", "Selection", "decode", "make_document", "make_drop", "name_reason", "within_cap"]

NOT_WALKED = frozenset({".git", ".hg", ".svn", "__pycache__"})
"""Version control metadata and byte-code caches are not part of a repository."""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_COMMENT = rb"[ \t\f]*(?:\#|//|/\*|\*|;|%|--|<!--|'|!|\(\*|\{-|(?:REM|rem|dnl|C|c)[ \t])"
_DECLARED = re.compile(
    rb"\A(?:[^\r\n]*+\r?\n){0,4}" + _COMMENT + rb"[^\r\n]*?coding[=:][ \t]*([A-Za-z][\w.:-]*)"
    rb"|<(?i:\?xml|meta|%@)\b[^>]*?(?i:charset|encoding)=[\"']?([A-Za-z][\w.:-]*)"
    rb"|\A@charset[ \t]+\"([A-Za-z][\w.:-]*)\""
)
_DECLARED_WITHIN = 1024
_TEXT_CODEC = re.compile(
    r"ascii|utf-8|iso8859-\d+|cp\d+|koi8-[rut]|gb2312|gbk|gb18030|big5\w*|euc_\w+|shift_jis\w*|iso2022_\w+|mac-\w+"
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which files are read, and how."""

    languages: frozenset[str] = CODE_LANGUAGES
    max_file_bytes: int = 1 << 20
    """larger files are not read"""
    max_repo_bytes: int | None = None
    """from a larger repository, folders are drawn at random up to this size"""
    fallback_encoding: str | None = None
    """encoding of text that is neither Unicode nor declares its own; None drops such files"""
    seed: int = 0
    exclude: Path | None = None
    """a folder to skip"""


def decode(data: bytes, fallback: str | None = None) -> tuple[str | None, str | None]:
    """(text, None), without the byte order mark, or (None, the reason why it cannot be decoded)."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        return None, "binary"
    for name in (encoding,) if encoding else ("utf-8", _declared(data), fallback):
        if name is not None:
            try:
                text = data.decode(name)
            except (UnicodeError, LookupError):
                continue
            return (None, "binary") if "\0" in text else (text, None)
    return None, "encoding unknown" if encoding is None else f"not {encoding.removesuffix('-sig').upper()}"


def name_reason(
    path: str, size: int, selection: Selection, skip_folders: Mapping[str, str] | None = None
) -> str | None:
    """Why a file is not worth opening, from its name and size alone."""
    candidates = candidate_languages(path, language_of(path))
    if not candidates:
        return "language unknown"
    if not candidates & selection.languages:
        return "language not selected"
    if not path.isprintable():  # undecodable bytes, or a line break that would end a path comment
        return "name not printable"
    for folder in path.split("/")[:-1] if skip_folders else ():
        if skip_folders and folder in skip_folders:
            return skip_folders[folder]
    return f"over {selection.max_file_bytes} bytes" if size > selection.max_file_bytes else None


def make_document(
    repo: str, path: str, data: bytes | str, selection: Selection, *, license: str | None
) -> Document | Dropped:
    """The file as a document, or dropped because of its content."""
    by_name = language_of(path)
    size = len(data) if isinstance(data, bytes) else len(data.encode())
    if size > selection.max_file_bytes:
        return make_drop(repo, path, size, f"over {selection.max_file_bytes} bytes")
    text, reason = decode(data, selection.fallback_encoding) if isinstance(data, bytes) else (data, None)
    if text is None or "\0" in text:
        return make_drop(repo, path, size, reason or "binary")
    language = settled_language(path, by_name, text)
    if language is None:
        return make_drop(repo, path, size, "language unknown")
    document = Document(repo=repo, path=path, language=language, text=text, size=size, license=license)
    return document if language in selection.languages else document.dropped("read", "language not selected")


def make_drop(repo: str, path: str, size: int, reason: str) -> Dropped:
    """The record of a file that was not read."""
    printable = path.encode("utf-8", "backslashreplace").decode()
    return Dropped(repo=repo, path=printable, language=language_of(path), size=size, stage="read", reason=reason)


def within_cap(files: Sequence[tuple[str, int]], max_bytes: int | None, key: str) -> set[str]:
    """Paths of the files, (path, size), drawn to fit; a folder's files go together: they depend on each other most."""
    if max_bytes is None or sum(size for _, size in files) <= max_bytes:
        return {path for path, _ in files}
    taken, left = set(), max_bytes
    for path, size in sorted(files, key=lambda file: (_digest(f"{key}:{os.path.dirname(file[0])}"), file[0])):
        if size <= left:
            taken.add(path)
            left -= size
    return taken


def _declared(data: bytes) -> str | None:
    """The encoding that the first lines declare, if it is a text encoding."""
    found = _DECLARED.search(data, 0, _DECLARED_WITHIN)
    if found is None:
        return None
    try:
        name = codecs.lookup(found[found.lastindex or 0].decode("ascii")).name
    except LookupError:
        return None
    return name if _TEXT_CODEC.fullmatch(name) else None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
