"""A small corpus of edge cases, with the expected outcome for each file.

`plant` writes repositories, an archive, a bomb and a benchmark; the tests build it and compare file by file, and
`kill_corpus.py` kills builds of it.
"""

import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path

__all__ = ["HUGE_BYTES", "Verdict", "plant"]

Verdict = tuple[str, str] | None
"""(stage, reason), or None for a file that is kept."""

HUGE_BYTES = 1 << 30

_TEST = "given a list of whole numbers return the sum of those that are odd and stand at even places"
_SHORT_TEST = "largest odd divisor"


class _Planted:
    """Writes files and remembers what must become of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.verdicts: dict[tuple[str, str], Verdict] = {}

    def add(self, repo: str, path: str, content: str | bytes, verdict: Verdict = None) -> None:
        file = self.root / repo / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.verdicts[repo, path] = verdict


def plant(root: Path, *, bomb_bytes: int, huge_bytes: int = HUGE_BYTES) -> dict[tuple[str, str], Verdict]:
    """Writes `root/repos` and `root/tests.jsonl`; (repository, path as recorded) -> what becomes of it.

    `bomb_bytes` is what the bomb expands to; it must be beyond what an archive may.
    """
    planted = _Planted(root / "repos")
    _plant_rules(planted)
    _plant_reading(planted, huge_bytes)
    _plant_archives(planted, bomb_bytes)
    _plant_copies(planted)
    _plant_quality(planted)
    tests = [{"task_id": "T/0", "prompt": _TEST}, {"task_id": "T/1", "prompt": _SHORT_TEST}]
    (root / "tests.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
    return planted.verdicts


def _plant_rules(planted: _Planted) -> None:
    """Each limit of the paper, the last file that stays and the first that goes."""
    rules = {
        "mean100.py": ("\n".join(_line(100, k) for k in range(10)) + "\n", None),
        "mean101.py": ("\n".join([*(_line(100, k) for k in range(20, 29)), _line(101, 29)]) + "\n",
                       "mean line over 100 characters"),
        "line1000.py": (_line(1000, 1) + "\n" + _code("line1000", 60), None),
        "line1001.py": (_line(1001, 2) + "\n" + _code("line1001", 60), "a line over 1000 characters"),
        "letters25.py": ("q" * 25 + "=" + "1" * 73 + "\n", None),
        "letters24.py": ("w" * 24 + "=" + "1" * 74 + "\n", "under 25% letters"),
        "xml86.py": (_after(86) + "<?xml version='1.0'?>\n", "XML declaration"),
        "xml87.py": (_after(87) + "<?xml version='1.0'?>\n", None),
        "sheet.xslt": ("<?xml version='1.0'?>\n<xsl:stylesheet xmlns:xsl='urn:x'></xsl:stylesheet>\n", None),
        "visible100.html": (_html(100, 500, "a"), None),
        "visible99.html": (_html(99, 400, "b"), "HTML with under 100 visible characters"),
        "share20.html": (_html(120, 600, "c"), None),
        "share19.html": (_html(120, 601, "d"), "HTML under 20% visible"),
        "empty.py": ("", "empty"),
        "blank.py": (" \n\n", "empty"),
    }  # fmt: skip
    for size, wanted in ((49, False), (50, True), (5000, True), (5001, False)):
        verdict = None if wanted else "data file outside 50 to 5000 characters"
        rules[f"data{size}.json"] = (_json(size), verdict)
        rules[f"data{size}.yaml"] = (_yaml(size), verdict)
    for path, (text, reason) in rules.items():
        planted.add("rules", path, text, None if reason is None else ("rules", reason))


def _plant_reading(planted: _Planted, huge_bytes: int) -> None:
    """Encodings, names, sizes, links."""

    def read(path: str, content: bytes, reason: str | None = None) -> None:
        planted.add("reading", path, content, None if reason is None else ("read", reason))

    read("utf16.py", ("\ufeff# größe\n" + _code("utf16", 5)).encode("utf-16-le"))
    read("bom.py", ("# größe\n" + _code("bom", 5)).encode("utf-8-sig"))
    read("declared.py", ("# -*- coding: latin-1 -*-\n# größe\n" + _code("declared", 5)).encode("latin-1"))
    read("unknown.py", ("# größe\n" + _code("unknown", 5)).encode("latin-1"), "encoding unknown")
    read("binary.py", b"x = 1\n\0\n", "binary")
    read("notes.txt", b"some notes", "language unknown")
    read("line\nbreak.py", _code("linebreak", 3).encode(), "name not printable")
    folder = planted.root / "reading"
    (folder / "huge.py").touch()
    os.truncate(folder / "huge.py", huge_bytes)
    planted.verdicts["reading", "huge.py"] = ("read", "over 1048576 bytes")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.py")).write_text(_code("name", 3))
    planted.verdicts["reading", "\\udcff.py"] = ("read", "name not printable")
    (folder / "sub").mkdir()
    (folder / "sub/loop").symlink_to(folder)
    (folder / "self.py").symlink_to(folder / "self.py")
    (folder / "link.py").symlink_to(folder / "utf16.py")
    os.mkfifo(folder / "pipe.py")
    for path in ("sub/loop", "self.py", "link.py"):
        planted.verdicts["reading", path] = ("read", "symbolic link")
    planted.verdicts["reading", "pipe.py"] = ("read", "not a regular file")


def _plant_archives(planted: _Planted, bomb_bytes: int) -> None:
    """One archive with paths that lead out, one that expands without end."""
    good = _code("archived", 8)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for path in ("ok.py", "../out.py", "/abs.py"):
            info = tarfile.TarInfo(path)
            info.size = len(good)
            archive.addfile(info, io.BytesIO(good.encode()))
    (planted.root / "outside.tar.gz").write_bytes(data.getvalue())
    planted.verdicts["outside", "ok.py"] = None
    planted.verdicts["outside", "../out.py"] = ("read", "path leads out of the archive")
    planted.verdicts["outside", "/abs.py"] = ("read", "path leads out of the archive")
    with (
        gzip.open(planted.root / "bomb.tar.gz", "wb", compresslevel=1) as raw,
        tarfile.open(fileobj=raw, mode="w|") as tar,
    ):
        info = tarfile.TarInfo("zeros.bin")
        info.size = bomb_bytes
        tar.addfile(info, _Zeros(bomb_bytes))
    planted.verdicts["bomb", "zeros.bin"] = ("read", "language unknown")
    planted.verdicts["bomb", "bomb.tar.gz"] = ("read", "archive expands too far")  # the reason begins so


def _plant_copies(planted: _Planted) -> None:
    """Exact copies, forks at several similarities, and a cycle of imports."""
    copies = ("dedup", "copy of another file")
    for repo in ("copies-a", "copies-b"):
        planted.add(repo, "own.py", _code(repo, 20))
        planted.add(repo, "same.py", _code("same", 5), None if repo == "copies-a" else copies)
    for name, changed in (("fork00", 0), ("fork05", 5), ("fork60", 60)):
        functions = [_function(f"{name}-{k}") for k in range(100)]
        other = functions[: 100 - changed] + [_function(f"{name}-other-{k}") for k in range(changed)]
        near = ("near-dedup", "near copy of another repository") if changed < 20 else None
        planted.add(name, "all.py", "".join(functions))
        planted.add(f"{name}-of", "all.py", "".join(other), near)
    planted.add("cycle", "pkg/__init__.py", "from pkg import alpha\n")
    planted.add("cycle", "pkg/alpha.py", "from pkg import beta\n" + _code("alpha", 4))
    planted.add("cycle", "pkg/beta.py", "from pkg import alpha\n" + _code("beta", 4))


def _plant_quality(planted: _Planted) -> None:
    """Broken and whole files of several languages, and files with pieces of the benchmark."""
    sources = {
        "py": ("def area(width):\n    return width\n", "def area(width:\n    return (\n"),
        "java": ("class A {\n  int area(int w) { return w; }\n}\n", "class A {\n  int area(int w { return ;;\n"),
        "js": ("function area(width) {\n  return width;\n}\n", "function area(width {\n  return }}} width\n"),
        "ts": ("export function area(w: number): number {\n  return w;\n}\n", "export function (: number {{\n"),
        "go": ("package area\n\nfunc A(w int) int {\n\treturn w\n}\n", "package area\n\nfunc (w int {{\n\treturn )\n"),
        "rb": ("def area(width)\n  width\nend\n", "def area(width\n  width ]]\nend end\n"),
        "php": ("<?php\nfunction area($w) {\n  return $w;\n}\n", "<?php\nfunction area($w {\n  return ))\n"),
        "rs": ("fn area(width: u32) -> u32 {\n    width\n}\n", "fn area(width: u32 -> {{ u32 (\n"),
    }  # fmt: skip
    for extension, (whole, broken) in sources.items():
        planted.add("quality", f"whole.{extension}", whole)
        planted.add("quality", f"broken.{extension}", broken, ("screening", "syntax error"))
    words = _TEST.split()
    sentences = {
        "ten.py": (" ".join(words[2:12]), "10 words of a benchmark"), "nine.py": (" ".join(words[2:11]), None),
        "short.py": (_SHORT_TEST, "a benchmark's string"), "part.py": ("largest odd number", None),
    }  # fmt: skip
    for path, (sentence, reason) in sentences.items():
        text = f'"""{sentence}"""\n' + _code(path, 4)
        planted.add("contaminated", path, text, None if reason is None else ("decontamination", reason))


class _Zeros(io.RawIOBase):
    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        taken = min(size, self._left)
        self._left -= taken
        return bytes(taken)


def _name(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8))


def _function(seed: str) -> str:
    rng = random.Random(seed)
    a, b, c, d = (_name(rng) for _ in range(4))
    return f"def {a}({b}, {c}):\n    {d} = {b} + {c}\n    return {d}\n\n"


def _code(seed: str, functions: int) -> str:
    return "".join(_function(f"{seed}-{index}") for index in range(functions))


def _line(length: int, seed: int) -> str:
    """A statement of that many characters."""
    rng = random.Random(seed)
    start = f"{_name(rng)} = '"
    return start + "".join(rng.choices("abcdefgh ", k=length - len(start) - 1)) + "'"


def _after(length: int) -> str:
    """Two comment lines of so many characters together, the second of them open."""
    return f"# {'some words ' * 3}\n#".ljust(length, "x")


def _html(visible: int, total: int, seed: str) -> str:
    rng = random.Random(seed)
    shown = " ".join(_name(rng) for _ in range(20))[:visible].rstrip()
    shown += "x" * (visible - len(shown))
    room = total - visible - len("<p></p>")
    lines = ("\n" + "class='" + "k" * 20 + "'") * (room // 29)
    return f"<p{lines}{' ' * (room - len(lines))}>{shown}</p>"


def _json(size: int) -> str:
    rng, text = random.Random(size), '["'
    while len(text) + 14 < size - 2:
        text += f'{_name(rng)}",\n"'
    return text + "z" * (size - 2 - len(text)) + '"]'


def _yaml(size: int) -> str:
    rng, text = random.Random(-size), ""
    while len(text) + 14 < size - 6:
        text += f"- {_name(rng)}\n"
    return text + "- " + "z" * (size - 3 - len(text)) + "\n"
