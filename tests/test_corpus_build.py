"""The whole build: counts that add up, the same output for any workers and order, and every failure."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import refusal, run_command, wait_until
from corpus_cases import read_rows, read_tree, write

from megacoder.core.errors import ConfigError, CorpusError, FormatError, MegacoderError
from megacoder.corpus import scan, shards
from megacoder.corpus.accounts import load_report
from megacoder.corpus.build import build_corpus
from megacoder.corpus.check import DocumentPass
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.dedup import ExactDedup
from megacoder.corpus.folder import claim_folder
from megacoder.corpus.near_config import NearDedupConfig
from megacoder.corpus.pool import WorkerPool
from megacoder.corpus.samples import SampleConfig
from megacoder.corpus.sources import Repository
from megacoder.corpus.split import SplitConfig

CODE = "def {name}():\n    return '{name} is the name of this function'\n"


@pytest.fixture
def repos(tmp_path):
    """Eight repositories: a chain of imports, duplicates within and across them, and files that every rule drops."""
    root = tmp_path / "repos"
    for index in range(8):
        name = f"repo{index}"
        write(root / name / "pkg/__init__.py", f"from pkg.top import *  # {name}\n")
        write(root / name / "pkg/top.py", f"from . import base\n{CODE.format(name=name)}")
        write(root / name / "pkg/base.py", CODE.format(name=f"{name}_base"))
        write(root / name / "setup.py", CODE.format(name="the_same_everywhere"))
        write(root / name / "main.rb", f"puts 'hello from {name}'\n")
    write(root / "repo1/copy.py", CODE.format(name="repo0_base"))
    write(root / "repo2/digits.py", "1" * 90)
    write(root / "repo2/wide.py", "a" * 1500)
    write(root / "repo2/empty/__init__.py", "")
    write(root / "repo2/binary.py", b"a\0b")
    write(root / "repo2/data.json", '{"a": "too short"}')
    write(root / "repo2/README.md", "# readme\n")
    return root


def config(repos, tmp_path, **options):
    return CorpusConfig(**({"input": (repos,), "out": tmp_path / "out", "workers": 1, "shard_bytes": 600} | options))


def test_documents_read_are_those_kept_plus_those_dropped(repos, tmp_path):
    report = build_corpus(config(repos, tmp_path), quiet=True)
    accounts, out = report.accounts, tmp_path / "out"
    on_disk = [path.stat().st_size for path in repos.rglob("*") if path.is_file()]
    dropped = [count for reasons in accounts.dropped.values() for count in reasons.values()]
    assert (accounts.seen.files, accounts.seen.bytes) == (len(on_disk), sum(on_disk))
    assert accounts.kept.files + sum(count.files for count in dropped) == len(on_disk)
    assert accounts.kept.bytes + sum(count.bytes for count in dropped) == sum(on_disk)
    assert {stage: {reason: count.files for reason, count in reasons.items()} for stage, reasons in
            accounts.dropped.items() if reasons} == {
        "read": {"binary": 1, "language not selected": 1},
        "rules": {
            "under 25% letters": 1, "mean line over 100 characters": 1, "empty": 1,
            "data file outside 50 to 5000 characters": 1,
        },
        "dedup": {"copy of another file": 8},
    }  # fmt: skip
    # the records agree with the counts, and every file is in exactly one of the three parts
    recorded = read_rows(out, "dropped")
    assert Counter((row["stage"], row["reason"]) for row in recorded) == Counter(
        {
            (stage, reason): count.files
            for stage, reasons in accounts.dropped.items()
            for reason, count in reasons.items()
        }
    )
    kept = read_rows(out, "train") + read_rows(out, "heldout")
    listed = [(row["repo"], row["path"]) for row in kept + recorded]
    assert sorted(listed) == sorted(
        (path.relative_to(repos).parts[0], "/".join(path.relative_to(repos).parts[1:]))
        for path in repos.rglob("*")
        if path.is_file()
    )
    assert len(kept) == accounts.kept.files
    assert sum(len(row["content"].encode()) for row in kept) == accounts.written
    assert {name: count.files for name, count in accounts.languages.items()} == {"Python": 25, "Ruby": 8}


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_a_copy_names_the_kept_file_for_any_split_of_the_digests(repos, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("megacoder.corpus.dedup._RECORDS_AT_ONCE", at_once)
    near = NearDedupConfig(level="none")
    build_corpus(config(repos, tmp_path, near_dedup=near, shard_bytes=1, workers=1), quiet=True)
    texts = {str(path.relative_to(repos)): path.read_bytes() for path in repos.rglob("*") if path.is_file()}
    copies = [row for row in read_rows(tmp_path / "out", "dropped") if row["stage"] == "dedup"]
    assert len(copies) == 8
    for row in copies:
        name = f"{row['repo']}/{row['path']}"
        assert row["detail"] == min(other for other in texts if texts[other] == texts[name]) < name


def test_samples_are_contiguous_ordered_and_carry_path_comments(repos, tmp_path):
    build_corpus(config(repos, tmp_path, heldout=SplitConfig(fraction=0)), quiet=True)
    train = read_rows(tmp_path / "out", "train")
    ids = [row["sample"] for row in train]
    assert len(set(ids)) == sum(1 for before, after in zip([None, *ids], ids, strict=False) if before != after)
    sample = [row for row in train if row["sample"] == "repo3/00001"]
    assert [row["path"] for row in sample] == ["pkg/base.py", "pkg/top.py", "pkg/__init__.py"]
    assert "".join(row["content"] for row in sample).startswith("# pkg/base.py\ndef repo3_base")
    assert next(row for row in train if row["path"] == "main.rb")["content"].startswith("# main.rb\nputs")
    assert not (tmp_path / "out/heldout").exists()


@dataclass(frozen=True)
class NoTops:
    name: str = "tops"

    def __call__(self, document):
        return document.dropped("tops", "a top", document.repo) if document.path.endswith("top.py") else document


def test_document_stages_can_run_after_dedup_and_record_a_detail(repos, tmp_path, monkeypatch):
    monkeypatch.setattr("megacoder.corpus.build.steps", lambda config: [ExactDedup("all"), DocumentPass([NoTops()])])
    monkeypatch.setattr("megacoder.corpus.build.stage_names", lambda config: ["read", "rules", "dedup", "tops"])
    report = build_corpus(config(repos, tmp_path), quiet=True)
    assert report.accounts.dropped["tops"]["a top"].files == 8
    assert report.accounts.seen.files == sum(path.is_file() for path in repos.rglob("*"))
    recorded = [row for row in read_rows(tmp_path / "out", "dropped") if row["stage"] == "tops"]
    assert [(row["repo"], row["detail"]) for row in recorded] == [
        (f"repo{index}", f"repo{index}") for index in range(8)
    ]
    assert not any(
        row["path"].endswith("top.py") for part in ("train", "heldout") for row in read_rows(tmp_path / "out", part)
    )


def test_duplicates_keep_the_first_in_name_order(repos, tmp_path):
    build_corpus(config(repos, tmp_path), quiet=True)
    kept = read_rows(tmp_path / "out", "train") + read_rows(tmp_path / "out", "heldout")
    assert [row["repo"] for row in kept if row["path"] == "setup.py"] == ["repo0"]
    assert not any(row["path"] == "copy.py" for row in kept)


@pytest.fixture
def shared(tmp_path):
    """Three repositories with a server that needs a module which all have, and a setup that stands alone in all."""
    for name in "abc":
        write(tmp_path / "shared" / name / "util.py", CODE.format(name="shared"))
        write(tmp_path / "shared" / name / "server.py", f"import util\n{CODE.format(name=name)}")
        write(tmp_path / "shared" / name / "setup.py", CODE.format(name="alone"))
    return tmp_path / "shared"


@pytest.mark.parametrize(
    ("exact_dedup", "later"),
    [
        ("alone", ["util.py", "server.py"]),
        ("all", ["server.py"]),
        ("none", ["util.py", "server.py", "setup.py"]),
    ],
)
def test_a_copy_stays_beside_the_files_that_need_it(shared, tmp_path, exact_dedup, later):
    options = {"heldout": SplitConfig(fraction=0), "exact_dedup": exact_dedup, "shard_bytes": 1}
    assert CorpusConfig(out=tmp_path).exact_dedup == "alone"
    report = build_corpus(config(shared, tmp_path, **options), quiet=True)
    first = ["util.py", "server.py", "setup.py"]
    assert [(row["repo"], row["path"]) for row in read_rows(tmp_path / "out", "train")] == [
        *(("a", path) for path in first), *(("b", path) for path in later), *(("c", path) for path in later),
    ]  # fmt: skip
    assert report.accounts.multi_file_samples == {"alone": 3, "all": 1, "none": 3}[exact_dedup]
    assert ("dedup" in report.accounts.dropped) == (exact_dedup != "none")
    recorded = [row for row in read_rows(tmp_path / "out", "dropped") if row["stage"] == "dedup"]
    assert all(row["detail"] == f"a/{row['path']}" for row in recorded)


@pytest.mark.parametrize("exact_dedup", ["alone", "all", "none"])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_no_held_out_text_is_trained_on(shared, tmp_path, exact_dedup, shard_bytes):
    options = {"heldout": SplitConfig(fraction=0.4), "exact_dedup": exact_dedup, "shard_bytes": shard_bytes}
    report = build_corpus(config(shared, tmp_path, **options), quiet=True)
    texts = {
        part: [row["content"].removeprefix(f"# {row['path']}\n") for row in read_rows(tmp_path / "out", part)]
        for part in ("train", "heldout")
    }
    assert texts["heldout"]
    assert not set(texts["heldout"]) & set(texts["train"])
    if exact_dedup != "all":  # what is trained on keeps its copies, and so its samples
        assert texts["train"].count(CODE.format(name="shared")) == 2
        assert texts["heldout"].count(CODE.format(name="shared")) == 0
        reasons = report.accounts.dropped["held out"]
        assert {reason: count.files for reason, count in reasons.items()} == {
            "copy of a training file": 1 if exact_dedup == "alone" else 2
        }


def test_files_held_out_of_one_repository_are_not_trained_on_either(tmp_path):
    for index in range(8):
        write(tmp_path / "one" / f"{index}/util.py", CODE.format(name=f"shared{index % 4}"))
        write(tmp_path / "one" / f"{index}/server.py", f"from . import util\n{CODE.format(name=f'server{index}')}")
    options = {"heldout": SplitConfig(fraction=0.3), "exact_dedup": "none"}
    report = build_corpus(
        config(tmp_path, tmp_path, **options), repositories=[Repository(name="one", root=tmp_path / "one")], quiet=True
    )
    assert report.split_unit == "file"
    train, held = (
        {row["content"].partition("\n")[2] for row in read_rows(tmp_path / "out", part)}
        for part in ("train", "heldout")
    )
    assert held
    assert not held & train
    assert report.accounts.dropped["held out"]


def test_natural_language_is_a_corpus_of_its_own_where_it_is_asked_for(repos, tmp_path):
    text = "What the project does, and what it does not do, said in one long paragraph. " * 3 + "\n"
    write(repos / "repo0/docs/usage.rst", f"{text}>>> import (\n")
    write(repos / "README.md", text)  # beside the repositories: does not make their folder one
    names = ("Markdown", "reStructuredText")
    report = build_corpus(config(repos, tmp_path, languages=names, heldout=SplitConfig(fraction=0)), quiet=True)
    train = read_rows(tmp_path / "out", "train")
    assert [(row["repo"], row["path"]) for row in train] == [("repo0", "docs/usage.rst"), ("repo2", "README.md")]
    assert train[1]["content"] == "# README.md\n# readme\n"
    assert report.accounts.multi_file_samples == 0
    build_corpus(config(repos, tmp_path, out=tmp_path / "code"), quiet=True)
    kept = read_rows(tmp_path / "code", "train") + read_rows(tmp_path / "code", "heldout")
    assert not {row["language"] for row in kept} & set(names)


def test_files_whose_group_exceeds_a_sample_are_counted(repos, tmp_path, capsys):
    build_corpus(config(repos, tmp_path, samples=SampleConfig(max_bytes=100)), quiet=True)
    _, printed, _ = run_command(capsys, "corpus", "report", tmp_path / "out")
    assert "0 of several files" in printed
    assert "24 files are samples by themselves" in printed
    assert "samples.max_bytes = 100" in printed


def test_held_out_repositories_are_complete(repos, tmp_path):
    report = build_corpus(config(repos, tmp_path, heldout=SplitConfig(fraction=0.3)), quiet=True)
    train, held = ({row["repo"] for row in read_rows(tmp_path / "out", part)} for part in ("train", "heldout"))
    assert report.split_unit == "repository"
    assert held == {name for name, row in report.accounts.repositories.items() if row.heldout.files}
    assert held
    assert train
    assert not held & train


def test_a_single_repository_is_split_by_file(repos, tmp_path):
    report = build_corpus(config(repos / "repo0", tmp_path, heldout=SplitConfig(fraction=0.3)), quiet=True)
    train, held = (read_rows(tmp_path / "out", part) for part in ("train", "heldout"))
    assert report.split_unit == "file"
    assert len(train) + len(held) == 5
    assert held
    assert train
    one = tmp_path / "one"
    write(one / "a.py", CODE.format(name="alone"))
    assert build_corpus(config(one, tmp_path, out=tmp_path / "out1"), quiet=True).split_unit == "none"


def test_the_output_is_the_same_for_any_workers_input_order_and_place(repos, tmp_path):
    build_corpus(config(repos, tmp_path), quiet=True)
    expected = read_tree(tmp_path / "out")
    parts = [path for path in expected if path.startswith("train/")]
    assert len(parts) > 2
    halves = [tmp_path / "half0", tmp_path / "half1"]
    build_corpus(config(repos, tmp_path, out=tmp_path / "out2", workers=2), quiet=True)
    assert read_tree(tmp_path / "out2") == expected
    for index, repo in enumerate(sorted(repos.iterdir())):
        halves[index % 2].mkdir(exist_ok=True)
        repo.rename(halves[index % 2] / repo.name)
    for out, inputs in (("out3", halves), ("out4", halves[::-1])):
        build_corpus(config(repos, tmp_path, out=tmp_path / out, input=tuple(inputs)), quiet=True)
    assert read_tree(tmp_path / "out3") == read_tree(tmp_path / "out4")
    assert {path: data for path, data in read_tree(tmp_path / "out3").items() if path.endswith(".parquet")} == {
        path: data for path, data in expected.items() if path.endswith(".parquet")
    }


def test_a_shard_may_be_read_in_any_number_of_parts(repos, tmp_path, monkeypatch):
    """As one of usual size is: many row groups, of which a few are held at a time."""
    options = {"shard_bytes": 1 << 20, "near_dedup": NearDedupConfig(level="both", min_words=1)}
    build_corpus(config(repos, tmp_path, out=tmp_path / "one", **options), quiet=True)
    monkeypatch.setattr(scan, "parquet_writer", functools.partial(shards.parquet_writer, row_group_bytes=1))
    monkeypatch.setattr(shards, "_CACHED_ROW_GROUPS", 2)
    build_corpus(config(repos, tmp_path, out=tmp_path / "many", **options), quiet=True)
    assert read_tree(tmp_path / "many") == read_tree(tmp_path / "one")


KILLED = """
import os, signal, sys
from pathlib import Path
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
real, left = os.replace, [int(sys.argv[3])]
def replace(*args):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # the file is written, its name not yet taken
    real(*args)
os.replace = replace
build_corpus(CorpusConfig(input=(Path(sys.argv[1]),), out=Path(sys.argv[2]), workers=1, shard_bytes=600), quiet=True)
"""


def test_after_kill_9_the_same_command_gives_the_same_output(repos, tmp_path):
    build_corpus(config(repos, tmp_path), quiet=True)
    expected = read_tree(tmp_path / "out")
    out = tmp_path / "killed"
    ended = []
    while not ended or ended[-1] == -signal.SIGKILL:  # sixteen writes take each run further than the one before
        assert len(ended) < 20, "a run does not go on from the one before"
        assert not (out / "corpus.json").exists()
        ended.append(subprocess.run([sys.executable, "-c", KILLED, str(repos), str(out), "16"], timeout=60).returncode)
    assert ended[-1] == 0
    assert len(ended) > 3
    assert read_tree(out) == expected


def test_finished_shards_are_not_done_again(repos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("megacoder.corpus.build.write_shard", _fail)
        with pytest.raises(RuntimeError):
            build_corpus(config(repos, tmp_path), quiet=True)
    monkeypatch.setattr("megacoder.corpus.scan.parquet_writer", _fail)
    report = build_corpus(config(repos, tmp_path), quiet=True)
    monkeypatch.setattr("megacoder.corpus.write.parquet_writer", _fail)
    before = read_tree(tmp_path / "out")
    assert build_corpus(config(repos, tmp_path), quiet=True) == report
    assert read_tree(tmp_path / "out") == before


def _fail(*args, **kwargs):
    raise RuntimeError("must not be called again")


def test_changed_inputs_are_built_again_and_leave_no_stale_shard(repos, tmp_path):
    build_corpus(config(repos, tmp_path), quiet=True)
    for index in range(3, 8):
        for path in sorted((repos / f"repo{index}").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    write(repos / "repo0/new.py", CODE.format(name="new"))
    build_corpus(config(repos, tmp_path), quiet=True)
    build_corpus(config(repos, tmp_path, out=tmp_path / "fresh"), quiet=True)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "fresh")


@pytest.mark.parametrize("changed", ["the first of copies", "what is held out"])
def test_a_shard_is_written_again_where_other_shards_change_it(repos, tmp_path, monkeypatch, changed):
    """Its files are as they were when an interrupted build wrote it, but what is dropped or held out of it is not."""
    with monkeypatch.context() as patch:
        patch.setattr("megacoder.corpus.build.save_report", _fail)
        with pytest.raises(RuntimeError):
            build_corpus(config(repos, tmp_path), quiet=True)
    held = read_rows(tmp_path / "out", "heldout")[0]["repo"]
    if changed == "the first of copies":
        write(repos / "repo0/setup.py", CODE.format(name="another"))
    else:
        write(repos / held / "zlarge.py", "".join(CODE.format(name=f"function{number}") for number in range(100)))
    for out in ("out", "fresh"):
        build_corpus(config(repos, tmp_path, out=tmp_path / out), quiet=True)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "fresh")
    assert changed != "what is held out" or held not in {row["repo"] for row in read_rows(tmp_path / "out", "heldout")}


def test_a_missing_output_file_is_made_again(repos, tmp_path):
    build_corpus(config(repos, tmp_path), quiet=True)
    expected = read_tree(tmp_path / "out")
    next((tmp_path / "out/train").glob("*.parquet")).unlink()
    build_corpus(config(repos, tmp_path), quiet=True)
    assert read_tree(tmp_path / "out") == expected


ORPHANS = """
import os, sys, time
from megacoder.corpus.pool import WorkerPool
def task(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)
if __name__ == "__main__":
    with WorkerPool(2) as pool:
        pool.run(task, [sys.argv[1]] * 2, done=lambda task: None)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "pids").mkdir()
    (tmp_path / "orphans.py").write_text(ORPHANS)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "orphans.py"), str(tmp_path / "pids")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(_alive(int(path.name)) for path in (tmp_path / "pids").iterdir()))


COMMAND = """
import os, time
from pathlib import Path
from megacoder.cli.main import COMMANDS
from megacoder.cli.main import main as megacoder
from megacoder.corpus.pool import WorkerPool
def work(folder):
    (folder / str(os.getpid())).touch()
    while not folder.with_name("go").exists():
        time.sleep(0.02)
def main(argv):
    with WorkerPool(2) as pool:
        pool.run(work, [Path(argv[0])] * 2, done=print)
def run(folder):
    COMMANDS["work"] = ("command", "")
    megacoder(["work", folder])
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["command", "workers too"])
def test_sigterm_ends_a_command_with_its_workers_and_one_line(tmp_path, send):
    (tmp_path / "pids").mkdir()
    (tmp_path / "command.py").write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, "-c", "import command, sys; command.run(sys.argv[1])", str(tmp_path / "pids")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    send(process.pid, signal.SIGTERM)
    (tmp_path / "go").touch()  # tasks that have begun are waited for
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (143, "megacoder: terminated\n")
    assert not any(_alive(int(path.name)) for path in (tmp_path / "pids").iterdir())


def _kill_worker(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line():
    with pytest.raises(CorpusError, match="fewer --workers"), WorkerPool(2) as pool:
        pool.run(_kill_worker, [0, 1], done=print)


def _process(task):
    return os.getpid()


def test_results_come_in_the_order_of_the_tasks_and_every_pass_in_the_same_processes():
    done = []
    with WorkerPool(2) as pool:
        assert pool.run(abs, [-3, -1, -2], done=done.append) == [3, 1, 2]
        assert sorted(done) == [-3, -2, -1]
        first, second = (set(pool.run(_process, range(20), done=print)) for _ in range(2))
        assert len(first | second) <= 2
        assert os.getpid() not in first | second
        assert pool.run(_process, [0], done=print) == [os.getpid()]  # one task is not worth a process


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_another_configuration_is_refused_by_the_key_that_differs(repos, tmp_path, monkeypatch):
    build_corpus(config(repos, tmp_path), quiet=True)
    before = read_tree(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"samples\.order = 'topo', not 'path'"):
        build_corpus(config(repos, tmp_path, samples=SampleConfig(order="path")), quiet=True)
    with pytest.raises(ConfigError, match=r"max_repo_bytes = None, not 5000"):
        build_corpus(config(repos, tmp_path, max_repo_bytes=5000), quiet=True)
    ours = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setattr("sys.version_info", (3, 99, 0))  # its parser may judge Python files otherwise
    with pytest.raises(ConfigError, match=rf"python = '{ours}', not '3\.99'"):
        build_corpus(config(repos, tmp_path), quiet=True)
    assert read_tree(tmp_path / "out") == before


def test_a_second_corpus_holds_out_the_same_repositories(repos, tmp_path):
    def held_out(out):
        rows = load_report(out).accounts.repositories.items()
        return {name for name, row in rows if row.heldout.files}

    for folder in repos.iterdir():
        write(folder / "README.md", f"# {folder.name}\n\nWhat this project does, in a few words about {folder.name}.\n")
    build_corpus(config(repos, tmp_path, heldout=SplitConfig(fraction=0.4)), quiet=True)
    chosen = held_out(tmp_path / "out")
    assert chosen
    like = SplitConfig(like=tmp_path / "out")
    build_corpus(config(repos, tmp_path, out=tmp_path / "words", languages=("Markdown",), heldout=like), quiet=True)
    assert held_out(tmp_path / "words") == chosen
    elsewhere = SplitConfig(like=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"heldout\.like = '.*nowhere': .* holds no finished corpus"):
        build_corpus(config(repos, tmp_path, out=tmp_path / "more", heldout=elsewhere), quiet=True)


def test_a_build_that_wrote_nothing_allows_other_options(repos, tmp_path):
    write(tmp_path / "rows.jsonl", '{"content": "x = 1"}\n')
    with pytest.raises(ConfigError, match="known to hold the repo"):  # met before any task has ended
        build_corpus(config(repos, tmp_path, input=(tmp_path / "rows.jsonl",)), quiet=True)
    assert list(read_tree(tmp_path / "out")) == ["config.json"]
    build_corpus(config(repos, tmp_path, seed=3), quiet=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["seed"] == 3
    with pytest.raises(ConfigError, match="seed = 3, not 0"):
        build_corpus(config(repos, tmp_path), quiet=True)


def test_a_running_build_and_another_programs_settings_are_not_replaced(repos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("megacoder.corpus.build.write_shard", _fail)
        with pytest.raises(RuntimeError):
            build_corpus(config(repos, tmp_path), quiet=True)
    with pytest.raises(ConfigError, match="seed = 0, not 3"):
        build_corpus(config(repos, tmp_path, seed=3), quiet=True)
    write(tmp_path / "model/config.json", '{"architectures": ["Llama"]}')
    with pytest.raises(ConfigError, match="was built with"):
        build_corpus(config(repos, tmp_path, out=tmp_path / "model"), quiet=True)


def test_a_folder_with_something_else_in_it_is_refused(repos, tmp_path):
    write(tmp_path / "out/thesis.tmp-1", "do not delete")
    with pytest.raises(ConfigError, match=r"not empty.*thesis"):
        build_corpus(config(repos, tmp_path), quiet=True)
    assert list(read_tree(tmp_path / "out")) == ["thesis.tmp-1"]


def test_one_build_at_a_time(repos, tmp_path):
    with claim_folder(tmp_path / "out", {}), pytest.raises(MegacoderError, match="another build"):
        build_corpus(config(repos, tmp_path), quiet=True)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(repos, tmp_path, monkeypatch):
    def open_full(path, mode):
        Path(path).touch()
        return open("/dev/full", mode)  # every write to it fails with ENOSPC

    with monkeypatch.context() as patch:
        patch.setattr(shards, "open", open_full, raising=False)
        with pytest.raises(CorpusError, match="No space left on device; free some space") as caught:
            build_corpus(config(repos, tmp_path), quiet=True)
    assert "\n" not in str(caught.value)
    assert sorted(read_tree(tmp_path / "out")) == ["config.json"]
    build_corpus(config(repos, tmp_path), quiet=True)
    build_corpus(config(repos, tmp_path, out=tmp_path / "fresh"), quiet=True)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "fresh")


def test_a_build_that_drops_everything_gives_reasons_and_leaves_nothing(tmp_path):
    for index in range(3):
        write(tmp_path / f"repos/a/{index}.py", "1" * 50)
    write(tmp_path / "repos/a/notes.txt", "notes")
    with pytest.raises(CorpusError, match=r"all 4 files were dropped \(3 under 25% letters, 1 language unknown\)"):
        build_corpus(config(tmp_path / "repos", tmp_path), quiet=True)
    assert not (tmp_path / "out").exists()


def test_empty_inputs_leave_a_finished_corpus_unchanged(repos, tmp_path):
    build_corpus(config(repos, tmp_path), quiet=True)
    before = read_tree(tmp_path / "out")
    for path in repos.rglob("*"):
        if path.is_file():
            path.write_text("")
    with pytest.raises(CorpusError, match="nothing is left"):
        build_corpus(config(repos, tmp_path), quiet=True)
    assert read_tree(tmp_path / "out") == before


def test_no_files_at_all(tmp_path):
    (tmp_path / "repos/a").mkdir(parents=True)
    with pytest.raises(CorpusError, match="hold no files"):
        build_corpus(config(tmp_path / "repos", tmp_path), quiet=True)


def test_repositories_can_be_given(repos, tmp_path):
    given = [Repository(name="b", root=repos / "repo1", prefix="b/"), Repository(name="a", root=repos / "repo0")]
    report = build_corpus(config(repos, tmp_path, input=()), repositories=given, quiet=True)
    assert list(report.accounts.repositories) == ["a", "b"]
    with pytest.raises(ConfigError, match="two repositories are called 'a'"):
        build_corpus(config(repos, tmp_path), repositories=[given[1], given[1]], quiet=True)
    paths = {
        row["path"] for part in ("train", "heldout") for row in read_rows(tmp_path / "out", part) if row["repo"] == "b"
    }
    assert "b/pkg/top.py" in paths


def test_the_corpus_inside_a_repository_is_not_read(repos, tmp_path):
    write(repos / "repo0/out/copy.py", CODE.format(name="repo7"))
    options = {"out": repos / "repo0/out"}
    (repos / "repo0/out/copy.py").unlink()
    first = build_corpus(config(repos, tmp_path, **options), quiet=True)
    assert build_corpus(config(repos, tmp_path, **options), quiet=True) == first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"languages": ("Pyhton",)}, "did you mean 'Python'"),
        ({"max_file_bytes": 0}, "max_file_bytes = 0"),
        ({"max_repo_bytes": 0}, "max_repo_bytes = 0"),
        ({"workers": -1}, "workers = -1"),
    ],
)
def test_bad_options(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        CorpusConfig(out=tmp_path, **options)


def test_a_report_reads_back_and_a_damaged_one_is_named(repos, tmp_path):
    report = build_corpus(config(repos, tmp_path), quiet=True)
    assert load_report(tmp_path / "out").accounts.to_plain() == report.accounts.to_plain()
    with pytest.raises(CorpusError, match="no finished corpus"):
        load_report(tmp_path)
    (tmp_path / "out/corpus.json").write_text("{}")
    with pytest.raises(FormatError, match="not a corpus report"):
        load_report(tmp_path / "out")


def test_the_commands(repos, tmp_path, capsys):
    build = ["corpus", "build", "--input", repos, "--out", tmp_path / "out", "--workers", 1]
    code, built, _ = run_command(capsys, *build)
    assert code == 0
    assert "rules: empty" in built
    assert "Ruby" in built
    report = ["corpus", "report", tmp_path / "out"]
    assert run_command(capsys, *report)[1] == built
    seen = json.loads((tmp_path / "out/corpus.json").read_text())["seen"]
    assert json.loads(run_command(capsys, *report, "--json")[1])["seen"] == seen
    assert "samples.order = 'topo', not 'path'" in refusal(capsys, *build, "--order", "path", code=2)
    assert "no such folder" in refusal(capsys, "corpus", "build", "--input", tmp_path / "nowhere", "--out", "x")
    assert "no finished corpus" in refusal(capsys, "corpus", "report", tmp_path)
