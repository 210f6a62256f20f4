"""The report of a corpus: as JSON, as a page that fetches nothing, and its drawing of a dependency graph."""

import itertools
import json
import random
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
from command_line import run_command
from corpus_cases import write
from html_reader import Reader

from megacoder.cli.main import main
from megacoder.core.errors import CorpusError, FormatError
from megacoder.core.layered_graph import layered_graph
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.near_config import NearDedupConfig
from megacoder.corpus.report import full_report
from megacoder.corpus.repository_graph import DependencyGraph
from megacoder.corpus.screening import ScreeningConfig, unscreened
from megacoder.corpus.split import SplitConfig

QUESTION = "return the sum of all even numbers in a list of integers"
FILES = {
    "pkg/base.py": "BASE = 'what all the others build on, in one way or another'\n",
    "pkg/left.py": "from pkg import base, right\n\n\ndef left():\n    return right, base, 'on the left side'\n",
    "pkg/right.py": "from pkg import left\n\n\ndef right():\n    return left, 'on the right side of things'\n",
    "pkg/top <b>&.py": "from pkg import left, digits\n\n\ndef top():\n    return left, digits, 'the top of a tower'\n",
    "pkg/alone.py": "def alone():\n    return 'nobody asks for me and I ask for nobody'\n",
    "pkg/digits.py": "1" * 90,
    "c/main.c": '#include "util.h"\n\nint main(void) { return helper(); }\n',
    "c/util.h": "1" * 90,  # dropped, and so main.c depends on no file that is left
    "lib/util.h": "int helper(void);  /* a header of the same name elsewhere */\n",
}
EDGES = {
    ("pkg/left.py", "pkg/base.py"),
    ("pkg/left.py", "pkg/right.py"),
    ("pkg/right.py", "pkg/left.py"),
    ("pkg/top <b>&.py", "pkg/left.py"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A repository with a cycle and its fork, a leaked test, an exact copy, and a language without a parser."""
    root = tmp_path_factory.mktemp("report")
    repos = {
        "app": FILES,
        "fork": FILES,
        "leaky": {"a.py": f"QUESTION = '{QUESTION}'\n", "copy.py": FILES["pkg/alone.py"]},
        "scripts": {"count.awk": '# of lines\nBEGIN { print "lines" }\n{ total += 1 }\nEND { print total }\n'},
    }
    for repo, files in repos.items():
        for path, text in files.items():
            write(root / "repos" / repo / path, text)
    (root / "tests.jsonl").write_text(json.dumps({"task_id": "T/7", "prompt": QUESTION}) + "\n")
    options = {"workers": 1, "screening": ScreeningConfig(heuristics=False), "heldout": SplitConfig(fraction=0.2)}
    config = CorpusConfig(
        input=(root / "repos",), out=root / "out", benchmarks=(root / "tests.jsonl",), shard_bytes=600, **options
    )
    build_corpus(config, quiet=True)
    return root / "out"


def as_json(capsys, *argv):
    main(["corpus", "report", *map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def test_json_holds_the_counts_and_findings(corpus, capsys):
    plain, accounts = as_json(capsys, corpus), json.loads((corpus / "corpus.json").read_text())
    assert {name: plain[name] for name in accounts} == accounts
    assert sum(plain["language_shares"].values()) == pytest.approx(1)
    assert plain["language_shares"]["AWK"] == accounts["languages"]["AWK"]["bytes"] / accounts["kept"]["bytes"]
    assert plain["unscreened_languages"] == ["AWK"]
    dropped = accounts["dropped"]["near-dedup"]["near copy of another repository"]
    assert plain["near_copies"] == [
        {"level": "repository", "keeper": "app", "copies": [{"name": "fork", "similarity": 1.0} | dropped]}
    ]
    words = " ".join(QUESTION.split()[:10])
    assert plain["contamination"] == [
        {"repository": "leaky", "path": "a.py", "reason": "10 words of a benchmark",
         "hits": [{"test": "tests.jsonl T/7", "words": words}]}
    ]  # fmt: skip


def test_the_graph_shows_the_imports_of_the_largest_repository(corpus, capsys):
    graph = as_json(capsys, corpus)["dependency_graph"]
    assert (graph["repository"], graph["alone"]) == ("app", 3)
    assert {tuple(edge) for edge in graph["depends_on"]} == EDGES
    assert len(graph["depends_on"]) == len(EDGES)
    place = {path: index for index, path in enumerate(graph["files"])}
    assert place["pkg/base.py"] < place["pkg/left.py"] < place["pkg/top <b>&.py"]
    other = as_json(capsys, corpus, "--repository", "scripts")["dependency_graph"]
    assert other == {"repository": "scripts", "files": [], "depends_on": [], "alone": 1}


def page_of(corpus, tmp_path, *argv):
    path = tmp_path / "report.html"
    main(["corpus", "report", str(corpus), "--out", str(path), *argv])
    text, reader = path.read_text(), Reader()
    reader.feed(text)
    assert not reader.open
    return text, reader


def test_the_page_is_complete_and_fetches_nothing(corpus, tmp_path, capsys):
    main(["corpus", "report", str(corpus)])
    printed = capsys.readouterr().out
    text, reader = page_of(corpus, tmp_path)
    assert capsys.readouterr().out == printed
    assert reader.sources == []
    assert "<script" not in text
    assert "url(" not in text
    for said in (
        "Not screened for syntax: AWK.", "- dedup: copy of another file", "fork",
        "tests.jsonl T/7", "leaky/a.py", "Dependencies in app", "pkg/top <b>&.py",
        "Files dropped because an earlier one has the same text: 1. Near copies dropped: 1, in 1 cluster.",
        "1 file held a piece of 1 test of tests.jsonl.",
    ):  # fmt: skip
        assert said in reader.texts, said
    assert any(said.endswith("closes a cycle. 4 edges in all; 3 files have none.") for said in reader.texts)
    assert "No file depends on another." in page_of(corpus, tmp_path, "--repository", "scripts")[1].texts


def test_searches_that_were_switched_off_are_reported(tmp_path):
    (tmp_path / "repos/r").mkdir(parents=True)
    (tmp_path / "repos/r/a.py").write_text(FILES["pkg/alone.py"])
    config = CorpusConfig(
        input=(tmp_path / "repos",), out=tmp_path / "out", workers=1, near_dedup=NearDedupConfig(level="none")
    )
    build_corpus(config, quiet=True)
    _, reader = page_of(tmp_path / "out", tmp_path)
    assert "No benchmark was given to search for." in reader.texts
    assert any(text.endswith("Near copies were not searched for.") for text in reader.texts)
    assert "Every one of these languages was screened by a parser." in reader.texts
    assert unscreened(["Python", "Go", "AWK"], syntax=True, off=("Go",)) == ["AWK", "Go"]
    assert unscreened(["Python"], syntax=False, off=()) == ["Python"]


@pytest.mark.parametrize(("oversize", "advice"), [("files", True), ("cut", False)])
def test_groups_over_the_limit_are_counted_with_the_option_that_keeps_their_order(tmp_path, capsys, oversize, advice):
    repo = tmp_path / "repos" / "app"
    repo.mkdir(parents=True)
    (repo / "base.py").write_text("BASE = 'what the other builds on, in one way or another'\n")
    (repo / "top.py").write_text("import base\n\n\ndef top():\n    return base, 'the top of a tower'\n")
    sizes = ["--samples.max-bytes", "60", "--samples.oversize", oversize, "--heldout.fraction", "0"]
    words = ["--input", tmp_path / "repos", "--out", tmp_path / "out", "--workers", "1", *sizes]
    main(["corpus", "build", *map(str, words)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 files are samples by themselves")
    assert last.endswith("= 60; to keep their order, build with --samples.oversize cut" if advice else "= 60")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--repository", "ap", "--json"], "no file of a repository 'ap' (did you mean 'app'?"),
        (["--repository", "fork", "--json"], "no file of a repository 'fork'"),
        (["--repository", "app"], "give --out FILE.html or --json"),
        (["--out", "."], "'.': it is a folder"),
    ],
)
def test_a_bad_request_is_one_line(corpus, argv, says, capsys):
    code, _, error = run_command(capsys, "corpus", "report", corpus, *argv)
    assert (code != 0, error.count("\n")) == (True, 1)
    assert says in error


def test_a_damaged_part_is_named(corpus, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(corpus, out)
    first = min((out / "dropped").iterdir())
    first.write_bytes(b"PAR1 and no more")
    with pytest.raises(FormatError, match=re.escape(f"{first}: not a part of a corpus")):
        full_report(out)
    first.unlink()
    with pytest.raises(CorpusError, match=re.escape(f"{first} is missing")):
        full_report(out)


def test_a_large_graph_is_cut_to_its_busiest_files():
    files = ("hub", *(f"leaf{index}" for index in range(50)), "pair")
    edges = (*((0, index) for index in range(1, 51)), (50, 51))
    cut = DependencyGraph(repository="r", files=files, edges=edges, alone=0).busiest(5)
    assert cut.files == ("hub", "leaf0", "leaf1", "leaf2", "leaf49")
    assert cut.edges == ((0, 1), (0, 2), (0, 3), (0, 4))


def drawing(names, edges):
    root = ET.fromstring(layered_graph(names, edges, describes="a <graph>"))
    boxes = {}
    for group in root.iter("g"):
        rect = group.find("rect")
        x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        boxes[group.find("title").text] = (x, y, x + width, y + height)
    _, _, width, height = map(float, root.find("svg").get("viewBox").split())
    return boxes, list(root.iter("path")), (width, height)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_keep_apart_and_lines_run_to_the_right_between_their_ends(seed):
    draw = random.Random(seed)
    names = [f"folder <{index}>/{'x' * draw.randrange(40)}{index}" for index in range(draw.choice([1, 2, 12, 40]))]
    pairs = itertools.product(range(len(names)), repeat=2)
    edges = [pair for pair in pairs if draw.random() < 1.5 / len(names)]
    boxes, paths, (width, height) = drawing(names, edges)
    assert set(boxes) == set(names)
    for left, top, right, bottom in boxes.values():
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    for (_, a), (_, b) in itertools.combinations(boxes.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    drawn = {}
    for path in paths:
        first, arrow, second = re.split(" ([→←↔]) ", path.find("title").text)
        ends = (first, second)
        points = [tuple(map(float, point.split(","))) for point in re.findall(r"[-\d.]+,[-\d.]+", path.get("d"))]
        start, end = boxes[ends[0]], boxes[ends[1]]
        assert points[0] == pytest.approx((start[2], (start[1] + start[3]) / 2), abs=0.11)
        assert points[-1] == pytest.approx((end[0], (end[1] + end[3]) / 2), abs=0.11)
        across = [x for x, _ in points]
        assert across == sorted(across)
        drawn[tuple(map(names.index, ends))] = arrow
        assert (path.get("stroke-dasharray") is not None) == (arrow != "→")
    wanted = {(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]}
    arrows = {(True, False): "→", (True, True): "↔", (False, True): "←"}
    assert drawn == {(a, b): arrows[(a, b) in edges, (b, a) in edges] for a, b in wanted}
    assert drawing(names, list(reversed(edges)))[0] == boxes


def test_the_lines_of_a_node_share_a_path_until_they_branch():
    chain = [(index, index + 1) for index in range(5)]
    _, paths, _ = drawing("abcdef", [*chain, (0, 4), (0, 5), (5, 1), (5, 2)])
    bends = {path.find("title").text: re.findall(r"[\d.]+,[\d.]+ H", path.get("d")) for path in paths}
    assert len(bends["a → e"]) == 3
    assert bends["a → f"][:3] == bends["a → e"]
    assert len(bends["c ← f"]) == 2
    assert bends["b ← f"][1:] == bends["c ← f"]
    assert not set(bends["b ← f"]) & set(bends["a → f"])
