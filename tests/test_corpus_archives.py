"""Archives: the same repository in any of them, and nothing that one holds can lead out, loop, or fill the disk."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import tracemalloc
import zipfile
import zlib

import pytest
import zstandard
from corpus_cases import write

from megacoder.corpus import archives
from megacoder.corpus.archives import Archive, archive_stem
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.inputs import find_inputs
from megacoder.corpus.reading import Selection
from megacoder.corpus.sources import Repository

FILES = {
    "proj/LICENSE": b"Permission is hereby granted, free of charge, to any person obtaining a copy",
    "proj/b.py": b"import a\n",
    "proj/a.py": b"x = 1\n",
    "proj/.git/x.py": b"hidden = 1\n",
    "proj/big.py": b"y" * 1001,
}
COMPRESS = {
    ".tar": lambda data: data, ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress, ".tar.zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


def tar(files, change=None):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out.getvalue()


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def read(path, **options):
    items = list(Archive(name="r", file=path).read(Selection(**({"max_file_bytes": 1000} | options))))
    documents = {item.path: item.text for item in items if isinstance(item, Document)}
    assert list(documents) == sorted(documents)
    assert {item.license for item in items if isinstance(item, Document)} <= {"MIT", "none"}
    return documents, {item.path: item.reason for item in items if isinstance(item, Dropped)}


@pytest.mark.parametrize("suffix", [*COMPRESS, ".zip"])
def test_every_kind_of_archive_holds_the_same_repository(tmp_path, suffix):
    path = tmp_path / f"proj-1.0{suffix}"
    path.write_bytes(zipped(FILES) if suffix == ".zip" else COMPRESS[suffix](tar(FILES)))
    assert read(path) == (
        {"a.py": "x = 1\n", "b.py": "import a\n"},
        {"LICENSE": "language unknown", "big.py": "over 1000 bytes"},
    )
    (source,) = find_inputs([tmp_path]).sources
    assert source == Archive(name="proj-1.0", file=path)
    assert {item.license for item in source.read(Selection()) if isinstance(item, Document)} == {"MIT"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_of_a_zip(tmp_path, compression):
    files = FILES | {"proj/c.py": b"".join(b"name_%d = %d\n" % (n, n * n) for n in range(5000)), "proj/empty.py": b""}
    (tmp_path / "z.zip").write_bytes(zipped(files, compression))
    documents, drops = read(tmp_path / "z.zip", max_file_bytes=1 << 20)
    assert documents.keys() == {"a.py", "b.py", "c.py", "big.py", "empty.py"}
    assert documents["c.py"].encode() == files["proj/c.py"]
    assert drops == {"LICENSE": "language unknown"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_expands_no_further_than_it_declares(tmp_path, compression):
    data = bytearray(zipped({"a.py": b"x = 1\n" * (5 << 20), "b.py": b"x = 2\n"}, compression))
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = data.index(signature) + at
        data[place : place + 4] = (600).to_bytes(4, "little")
    (tmp_path / "z.zip").write_bytes(data)
    tracemalloc.start()
    try:
        assert read(tmp_path / "z.zip") == ({"b.py": "x = 2\n"}, {"a.py": "unreadable: BadZipFile"})
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_member_without_a_name_is_recorded(tmp_path):
    data = zipped({"a.py": b"x = 1\n", "b.py": b"y = 2\n"})
    (tmp_path / "z.zip").write_bytes(data.replace(b"b.py", b"\0.py"))
    assert read(tmp_path / "z.zip") == ({"a.py": "x = 1\n"}, {"": "no name"})


def test_an_archive_that_was_replaced_is_another_even_where_it_is_as_large(tmp_path):
    path, found = tmp_path / "t.tar", []
    for second, text in enumerate((b"x = 1\n", b"x = 2\n")):
        path.write_bytes(tar({"a.py": text}))
        os.utime(path, (second, second))
        found.append(Archive(name="r", file=path).inventory(Selection()))
    assert found[0].size == found[1].size
    assert found[0].fingerprint != found[1].fingerprint


def test_archives_by_name():
    assert archive_stem("a.TAR.GZ") == "a"
    assert archive_stem("a.b.zip") == "a.b"
    assert archive_stem("a.gz") is None
    assert archive_stem(".zip") is None


def test_paths_that_lead_out_are_recorded_and_lead_nowhere(tmp_path):
    files = {"../up.py": b"1", "/etc/abs.py": b"2", "a/../../up.py": b"3", "C:/x.py": b"4", "./ok.py": b"ok"}
    for name, data in (("t.tar", tar(files)), ("z.zip", zipped(files))):
        (tmp_path / name).write_bytes(data)
        documents, drops = read(tmp_path / name)
        assert documents == {"ok.py": "ok"}
        assert drops == dict.fromkeys(
            ["../up.py", "/etc/abs.py", "a/../../up.py", "C:/x.py"], "path leads out of the archive"
        )
    assert sorted(os.listdir(tmp_path)) == ["t.tar", "z.zip"]


@pytest.mark.parametrize("top", ["", "proj/"])
def test_licenses_below_the_root_are_not_the_repositorys(tmp_path, top):
    files = {f"{top}a.py": b"x = 1\n", f"{top}third/LICENSE": FILES["proj/LICENSE"]}
    (tmp_path / "z.zip").write_bytes(zipped(files))
    items = Archive(name="r", file=tmp_path / "z.zip").read(Selection())
    assert {item.license for item in items if isinstance(item, Document)} == {"none"}


def test_folders_that_are_not_walked_are_not_read_at_any_depth(tmp_path):
    (tmp_path / "z.zip").write_bytes(zipped({"p/a.py": b"x = 1\n", "p/q/.git/b.py": b"y = 2\n", "p/.git": b"z"}))
    assert read(tmp_path / "z.zip") == ({"a.py": "x = 1\n"}, {".git": "language unknown"})


def test_a_file_of_exactly_the_limit_is_read(tmp_path):
    (tmp_path / "t.tar").write_bytes(tar({"a.py": b"y" * 1000, "b.py": b"y" * 1001}))
    assert read(tmp_path / "t.tar") == ({"a.py": "y" * 1000}, {"b.py": "over 1000 bytes"})


def test_an_archive_may_always_expand_to_the_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_EXPANSION", 1)
    (tmp_path / "z.zip").write_bytes(zipped({"a.py": b"y" * 1000}))
    assert read(tmp_path / "z.zip") == ({"a.py": "y" * 1000}, {})


def test_a_repository_over_its_limit_keeps_the_same_files_in_an_archive_as_in_a_folder(tmp_path):
    files = {f"src{number}/a.py": b"x = 1\n" * (1 + number) for number in range(12)} | {"top.py": b"y = 2\n"}
    (tmp_path / "r.zip").write_bytes(zipped({f"r-1.0/{path}": data for path, data in files.items()}))
    for path, data in files.items():
        write(tmp_path / "r" / path, data)
    selection = Selection(max_repo_bytes=200, seed=1)
    sources = (Archive(name="r", file=tmp_path / "r.zip"), Repository(name="r", root=tmp_path / "r"))
    kept, other = ([item.path for item in source.read(selection) if isinstance(item, Document)] for source in sources)
    assert kept == other
    assert 0 < len(kept) < len(files)


def test_a_member_that_was_changed_is_recorded(tmp_path):
    data = zipped({"a.py": b"x = 1\n", "b.py": b"y = 2\n"}, zipfile.ZIP_LZMA)
    crc = zlib.crc32(b"x = 1\n").to_bytes(4, "little")
    assert data.count(crc) == 2
    (tmp_path / "z.zip").write_bytes(data.replace(crc, b"\0\0\0\0"))
    assert read(tmp_path / "z.zip") == ({"b.py": "y = 2\n"}, {"a.py": "unreadable: BadZipFile"})


def test_links_devices_and_duplicate_names_are_recorded(tmp_path):
    def change(info):
        kinds = {"link.py": tarfile.SYMTYPE, "hard.py": tarfile.LNKTYPE, "dev.py": tarfile.CHRTYPE}
        if info.name in kinds:
            info.type, info.linkname, info.size = kinds[info.name], "a.py", 0

    files = dict.fromkeys(["a.py", "link.py", "hard.py", "dev.py", "a/b.py", "./a/b.py"], b"x = 1\n")
    (tmp_path / "t.tar").write_bytes(tar(files, change))
    documents, drops = read(tmp_path / "t.tar")
    assert set(documents) == {"a.py", "a/b.py"}
    assert drops == {
        "link.py": "symbolic link", "hard.py": "hard link", "dev.py": "not a regular file",
        "a/b.py": "path taken by an earlier file",
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        info = zipfile.ZipInfo("link.py")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert read(tmp_path / "z.zip") == ({}, {"link.py": "symbolic link"})


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "t.tar").write_bytes(tar({"a.py": b"x", "\udcff.py": b"y"}))
    assert read(tmp_path / "t.tar") == ({"a.py": "x"}, {"\\udcff.py": "name not printable"})


def test_a_bomb_is_abandoned_at_the_expansion_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_EXPANSION_FLOOR", 1 << 20)
    files = {"a.py": b"x = 1\n", "zeros.bin": bytes(20 << 20), "z.py": b"z = 1\n"}
    (tmp_path / "t.tar.xz").write_bytes(lzma.compress(tar(files)))
    documents, drops = read(tmp_path / "t.tar.xz")
    assert documents == {"a.py": "x = 1\n"}
    assert drops.pop("zeros.bin") == "language unknown"
    ((name, reason),) = drops.items()
    assert name == "t.tar.xz"
    assert "expands beyond" in reason
    many = {f"{index:04d}.py": b"a" * 900 for index in range(2000)}  # 1.8 MB, each allowed by itself
    (tmp_path / "z.zip").write_bytes(zipped(many))
    monkeypatch.setattr(archives, "_EXPANSION", 1)
    documents, drops = read(tmp_path / "z.zip")
    assert len(documents) + len(drops) == 2000
    assert set(drops.values()) == {"archive expands too far"}
    assert sum(map(len, documents.values())) <= 1 << 20


def test_a_zip_that_lies_about_a_size_is_not_read_further(tmp_path):
    data = bytearray(zipped({"a.py": b"y" * 5000}))
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = (10).to_bytes(4, "little")
    (tmp_path / "z.zip").write_bytes(data)
    documents, drops = read(tmp_path / "z.zip")
    assert documents == {} or len(documents["a.py"]) <= 10
    assert len(documents) + len(drops) == 1


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 3)
    (tmp_path / "z.zip").write_bytes(zipped({f"{index}.py": b"x" for index in range(5)}))
    documents, drops = read(tmp_path / "z.zip")
    assert len(documents) == 3
    assert drops == {"z.zip": "archive holds over 3 files: the rest is not read"}


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.tar.zst", "t.tar.xz", "t.tar.bz2", "z.zip"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_archive_is_recorded_and_its_earlier_files_are_kept(tmp_path, name, damage):
    files = {f"{index}.py": os.urandom(300).hex().encode() for index in range(30)}
    suffix = name[1:]
    whole = zipped(files) if suffix == ".zip" else COMPRESS[suffix](tar(files))
    data = {"cut": whole[: len(whole) * 2 // 3], "garbage": os.urandom(5000), "empty": b""}[damage]
    (tmp_path / name).write_bytes(data)
    documents, drops = read(tmp_path / name)
    assert name in drops, drops
    assert drops[name].startswith("archive damaged")
    if (name, damage) == ("t.tar", "cut"):
        assert documents
        assert all(text == files[path].decode() for path, text in documents.items())


def test_an_encrypted_member_is_recorded(tmp_path):
    data = bytearray(zipped({"a.py": b"x"}))
    central = data.rindex(b"PK\x01\x02")
    data[central + 8] |= 1
    (tmp_path / "z.zip").write_bytes(data)
    assert read(tmp_path / "z.zip") == ({}, {"a.py": "encrypted"})
