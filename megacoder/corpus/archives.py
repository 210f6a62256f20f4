"""Archives as repositories: zip, and tar under any compression. Nothing is unpacked to the file system.

One pass over the members copies the bytes of those worth reading to an anonymous temporary file; they are then read
back in path order. So no name can escape to the file system: an absolute one, or one with `..`, is recorded as dropped.
Links are recorded, never followed. An archive may expand to `_EXPANSION` times its own size (at least to
`_EXPANSION_FLOOR`); the rest is not read, which disarms zip bombs. No member expands to more than it declares: zipfile
sees to that for deflate only, so bzip2 and LZMA members are decompressed here.
"""

import bz2
import copy
import gzip
import hashlib
import io
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.licenses import LICENSE_BYTES, is_license_file, license_of
from megacoder.corpus.reading import NOT_WALKED, Selection, decode, make_document, make_drop, name_reason, within_cap
from megacoder.corpus.sources import Inventory

__all__ = ["Archive", "archive_stem"]

_TAR: dict[str, Callable[..., Any]] = {
    "": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open, ".zst": zstandard.open,
}  # fmt: skip
_TAR_SHORT = {".tgz": ".gz", ".tbz2": ".bz2", ".tbz": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
_EXPANSION = 100  # times; source code seldom compresses beyond 20
_EXPANSION_FLOOR = 256 << 20  # bytes that any archive may expand to
_MAX_MEMBERS = 1_000_000
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError,
    NotImplementedError, RuntimeError, struct.error, ValueError, OverflowError, MemoryError,
)  # fmt: skip
"""What the libraries raise for damaged archives."""
_LZMA_MEMORY = 128 << 20
_CHUNK = 1 << 16


def archive_stem(name: str) -> str | None:
    """The name without its archive suffix, None if it has none: `a.tar.gz` -> `a`."""
    lower = name.lower()
    for suffix in [".zip", *(f".tar{compression}" for compression in _TAR), *_TAR_SHORT]:
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A repository in an archive; a single top folder around everything is not part of the paths."""

    name: str
    file: Path

    def identity(self) -> list[Any]:
        """The fields as plain values."""
        return [self.name, str(self.file)]

    def inventory(self, selection: Selection) -> Inventory:
        """From the archive's own size and time; the size of its contents is a guess."""
        status = os.stat(self.file)
        state = hashlib.sha256(f"{status.st_size}\0{status.st_mtime_ns}".encode())
        return Inventory(size=4 * status.st_size, fingerprint=state.hexdigest())

    def read(self, selection: Selection) -> Iterator[Document | Dropped]:
        """Every member, as a document or as a drop with its reason; documents in path order."""
        with tempfile.SpooledTemporaryFile(max_size=32 << 20) as spool:
            listing = _Listing(selection, spool)
            try:
                for member in self._members():
                    listing.add(member)
            except _TooMuch as error:
                listing.broken = f"archive {error}: the rest is not read"
            except _DAMAGED as error:
                listing.broken = f"archive damaged: {type(error).__name__}"
            yield from listing.items(self.name, self.file.name)

    def _members(self) -> Iterator["_Member"]:
        allowed = max(_EXPANSION_FLOOR, _EXPANSION * self.file.stat().st_size)
        if self.file.name.lower().endswith(".zip"):
            yield from _zip_members(self.file, allowed)
            return
        suffix = self.file.suffix.lower()
        with (
            _TAR[_TAR_SHORT.get(suffix, "" if suffix == ".tar" else suffix)](self.file, "rb") as raw,
            _Bounded(raw, allowed) as bounded,
            tarfile.open(fileobj=bounded, mode="r|", errors="surrogateescape") as tar,
        ):
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all of a million members
                if not info.isdir():
                    yield _tar_member(tar, info)
            if not bounded.in_blocks:
                raise EOFError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    path: str
    size: int
    reason: str | None
    file: Any
    """opens it: a callable that returns a stream"""


class _Listing:
    """What one pass over an archive's members found."""

    def __init__(self, selection: Selection, spool: IO[bytes]) -> None:
        self.broken: str | None = None
        self._selection, self._spool = selection, spool
        self._dropped: list[tuple[str, int, str]] = []
        self._places: dict[str, tuple[int, int]] = {}  # path -> (offset, size) in the spool
        self._licenses: dict[str, str] = {}
        self._seen: set[str] = set()

    def add(self, member: _Member) -> None:
        """Records a member, and stores its bytes if its name and size qualify."""
        if len(self._seen) >= _MAX_MEMBERS:
            raise _TooMuch(f"holds over {_MAX_MEMBERS} files")
        path = member.path
        if not NOT_WALKED.isdisjoint(path.split("/")[:-1]):
            return
        reason = member.reason or _path_reason(path)
        if reason is None and path in self._seen:
            reason = "path taken by an earlier file"
        self._seen.add(path)
        licensed = reason is None and path.count("/") <= 1 and is_license_file(path.rpartition("/")[2])
        reason = reason or name_reason(path, member.size, self._selection)
        if reason is not None:
            self._dropped.append((path, member.size, reason))
        if licensed or reason is None:
            self._fetch(member, kept=reason is None, licensed=licensed)

    def _fetch(self, member: _Member, *, kept: bool, licensed: bool) -> None:
        """Reads a file that is `kept`, states the license (`licensed`), or both."""
        try:
            with member.file() as stream:
                data = stream.read(self._selection.max_file_bytes + 1 if kept else LICENSE_BYTES)
        except (_TooMuch, _Unaffordable, *_DAMAGED) as error:
            too_much = isinstance(error, _TooMuch | _Unaffordable)
            if kept:
                reason = "archive expands too far" if too_much else f"unreadable: {type(error).__name__}"
                self._dropped.append((member.path, member.size, reason))
            if isinstance(error, _TooMuch):
                raise
            return
        if licensed:
            self._licenses[member.path] = decode(data[:LICENSE_BYTES], "latin-1")[0] or ""
        if kept:
            self._places[member.path] = (self._spool.tell(), len(data))
            self._spool.write(data)

    def items(self, repo: str, archive: str) -> Iterator[Document | Dropped]:
        """The members; a failure of the archive itself is one more record, under the archive's name."""
        if self.broken is not None:
            yield make_drop(repo, archive, 0, self.broken)
        top = self._common_folder()
        for path, size, reason in self._dropped:
            yield make_drop(repo, path[len(top) :] or path, size, reason)
        roots = [(path[len(top) :], text) for path, text in self._licenses.items()]
        license_ = license_of((path, text) for path, text in roots if "/" not in path)
        places = {path[len(top) :]: place for path, place in sorted(self._places.items())}
        sizes = [(path, size) for path, (_, size) in places.items()]
        within = within_cap(sizes, self._selection.max_repo_bytes, f"{self._selection.seed}:{repo}")
        for path, (offset, size) in places.items():
            if path not in within:
                yield make_drop(repo, path, size, "over the limit for one repository")
                continue
            self._spool.seek(offset)
            yield make_document(repo, path, self._spool.read(size), self._selection, license=license_)

    def _common_folder(self) -> str:
        tops = {path.partition("/")[0] if "/" in path else "" for path in self._seen}
        return f"{tops.pop()}/" if len(tops) == 1 and "" not in tops else ""


class _TooMuch(Exception):
    """The archive exceeds a limit; the rest of it is not read."""


class _Unaffordable(Exception):
    """This member would exceed what the archive may expand to; others may still fit."""


class _Bounded(io.RawIOBase):
    """A stream that raises `_TooMuch` after `allowed` bytes."""

    def __init__(self, raw: Any, allowed: int) -> None:
        self._raw, self._left, self._allowed = raw, allowed, allowed

    @property
    def in_blocks(self) -> bool:
        """Whether a whole number of tar blocks was read so far, as it is unless the file was cut off."""
        return (self._allowed - self._left) % tarfile.BLOCKSIZE == 0

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _TooMuch(f"expands beyond {self._allowed} bytes")
        return data


def _path_reason(path: str) -> str | None:
    if path.startswith("/") or ".." in path.split("/") or path[1:3] in (":/", ":\\"):
        return "path leads out of the archive"
    return None


def _clean(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".")) if not name.startswith("/") else name


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    reason = None
    if info.issym():
        reason = "symbolic link"
    elif not info.isreg():
        reason = "hard link" if info.islnk() else "not a regular file"
    size = info.size if info.isreg() else 0
    return _Member(path=_clean(info.name), size=size, reason=reason, file=lambda: tar.extractfile(info))


def _zip_members(file: Path, allowed: int) -> Iterator[_Member]:
    left = allowed
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename and info.is_dir():
                continue
            reason = None
            if not info.filename:  # zipfile cuts a name at a NUL
                reason = "no name"
            elif stat.S_ISLNK(info.external_attr >> 16):
                reason = "symbolic link"
            elif info.flag_bits & 1:
                reason = "encrypted"

            def opened(info: zipfile.ZipInfo = info) -> IO[bytes]:
                nonlocal left
                left -= info.file_size
                if left < 0:
                    raise _Unaffordable
                if info.compress_type in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
                    return io.BytesIO(_expanded(archive, info))
                return archive.open(info)

            size = info.file_size if reason is None else 0
            yield _Member(path=_clean(info.filename), size=size, reason=reason, file=opened)


def _expanded(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A bzip2 or LZMA member's content, decompressed no further than one byte beyond the size that it declares."""
    stored = copy.copy(info)
    stored.compress_type, stored.file_size = zipfile.ZIP_STORED, info.compress_size
    del stored.CRC  # that of the content
    data = bytearray()
    with archive.open(stored) as raw:
        if info.compress_type == zipfile.ZIP_BZIP2:
            decompressor: Any = bz2.BZ2Decompressor()
        else:  # after a header of 4 bytes the fields with which an .lzma file begins; that one also has a size: unknown
            _, length = struct.unpack("<HH", raw.read(4))
            decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)
            decompressor.decompress(raw.read(length) + b"\xff" * 8)
        while len(data) <= info.file_size and not decompressor.eof:
            piece = raw.read(_CHUNK) if decompressor.needs_input else b""
            if not piece and decompressor.needs_input:
                break
            data += decompressor.decompress(piece, info.file_size + 1 - len(data))
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename!r} does not expand to what the archive declares")
    return bytes(data)
