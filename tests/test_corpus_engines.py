"""Clusters: the same corpus, byte for byte, from Ray hosts of which one dies, and from a Slurm job array."""

import contextlib
import json
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
from command_line import run_command, wait_until
from corpus_cases import read_tree, write
from network_hosts import ROOT, Hosts, need_namespaces

from megacoder.core.errors import ConfigError, CorpusError
from megacoder.corpus import engines
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.engines import ClusterConfig, run_on
from megacoder.corpus.pool import WorkerPool

LIMIT = 240
WORDS = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture
def repos(tmp_path):
    for repo in range(12):
        for place in range(3):
            name = f"call_{repo if place else 0}_{place}"
            text = "".join(f"def {name}_{i}(value):\n    return value + {i}\n" for i in range(40))
            write(tmp_path / "repos" / f"repo{repo:02d}" / f"part{place}.py", text)
    return tmp_path / "repos"


def build(repos, out, **options):
    return build_corpus(CorpusConfig(input=(repos,), out=out, shard_bytes=8000, **options), quiet=True)


def double(task):
    if task == 13:
        raise CorpusError("task 13 cannot be done")
    return 2 * task


def run(engine, tasks, work, **options):
    done = []
    config = ClusterConfig(engine=engine, **options)
    with WorkerPool(2) as pool:
        results = run_on(config, double, tasks, pool=pool, work=work, done=done.append)
    assert sorted(done) == sorted(tasks)
    return results


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch, tmp_path, repos):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "datatrove.executor.slurm", None)
    for engine in ("ray", "slurm"):
        with pytest.raises(ConfigError, match=rf"pip install 'megacoder\[{engine}\]'"):
            run(engine, [1], tmp_path)


def test_no_cluster_is_one_line(tmp_path, repos, capsys):
    pytest.importorskip("ray")
    words = ["corpus", "build", "--input", repos, "--out", tmp_path / "out", "--engine", "ray"]
    code, _, err = run_command(capsys, *words, "--ray-address", "127.0.0.1:1")
    assert code
    assert "no Ray cluster at '127.0.0.1:1'" in err


def test_a_build_on_two_ray_hosts_survives_the_death_of_one(tmp_path, repos):
    pytest.importorskip("ray")
    need_namespaces()
    build(repos, tmp_path / "local", workers=1)
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "RAY_DISABLE_MEMORY_MONITOR": "1",
    }
    with Hosts(2, tmp_path) as hosts:
        running = []
        try:
            head = ["--head", "--node-ip-address", "10.98.7.1", "--port", "6379", "--include-dashboard", "false"]
            running.append(hosts.start(1, *start, *head, "--temp-dir", "/tmp/megacoder-ray", **environment))
            knock = "import socket; socket.create_connection(('10.98.7.1', 6379), 1)"
            while hosts.start(1, sys.executable, "-c", knock).wait():
                time.sleep(0.5)
            second = ["--address", "10.98.7.1:6379", "--node-ip-address", "10.98.7.2"]
            running.append(hosts.start(2, *start, *second, **environment))
            while not any(b"default_worker" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in hosts.pids(2)):
                time.sleep(0.5)
            driver = hosts.start(
                1, sys.executable, "-m", "megacoder", "corpus", "build", "--input", str(repos), "--out",
                str(tmp_path / "ray"), "--shard-bytes", "8000", "--engine", "ray", "--ray-address", "10.98.7.1:6379",
                **environment,
            )  # fmt: skip
            running.append(driver)
            work = tmp_path / "ray" / "work"
            wait_until(lambda: list(work.glob("scanned-*.json")) or driver.poll() is not None, LIMIT)
            assert driver.poll() is None, driver.stderr.read()
            for pid in hosts.pids(2):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _, errors = driver.communicate(timeout=LIMIT)
            assert driver.returncode == 0, errors
        finally:
            for host in (1, 2):
                for pid in hosts.pids(host):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for process in running:
                process.wait(timeout=LIMIT)
    assert read_tree(tmp_path / "ray") == read_tree(tmp_path / "local")


def test_results_come_in_order_and_the_first_error_ends_the_run(tmp_path):
    assert run("local", [3, 1, 2], tmp_path) == [6, 2, 4]
    with pytest.raises(CorpusError, match="task 13"):
        run("local", [1, 13], tmp_path)


class Executor:
    """In place of datatrove's: runs the pipeline here, as its ranks would, all of them or but the first."""

    job_id, lost = 7, False

    def __init__(self, pipeline, tasks, **options):
        self.pipeline, self.tasks = pipeline, tasks

    def run(self):
        for rank in reversed(range(1 if self.lost else self.tasks)):
            for step in self.pipeline:
                step(None, rank, self.tasks)


@pytest.fixture
def slurm(monkeypatch):
    module = type(sys)("fake")
    module.SlurmPipelineExecutor = Executor
    monkeypatch.setattr(engines, "_extra", lambda *names: module)
    monkeypatch.setattr(engines, "_in_queue", lambda job: False)


def test_slurm_is_asked_once_for_an_array_and_its_results_are_read(tmp_path, slurm, monkeypatch):
    assert run("slurm", [3, 1, 2], tmp_path) == [6, 2, 4]
    with pytest.raises(CorpusError, match="task 13"):
        run("slurm", [1, 13], tmp_path)
    monkeypatch.setattr(Executor, "lost", True)
    with pytest.raises(CorpusError, match="job 7 ended without 2 of 3 tasks"):
        run("slurm", [3, 1, 2], tmp_path)


def test_every_kind_of_task_reaches_slurm_as_data(tmp_path, slurm, repos):
    """A folder, an archive and a table, through every stage, tasks and results in files: nothing changes."""
    (repos / "repo00" / "broken.py").write_text("def (:\n" * 20)
    (repos / "repo01" / "test.py").write_text(f"answer = '{WORDS}'\n")
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(repos / "repo02", "packed")
    rows = [{"content": f"def of_a_table_{i}():\n    return {i}\n" * 9, "path": f"{i}.py"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"repo": f"t{i}", **row}) + "\n" for i, row in enumerate(rows))
    )
    (tmp_path / "bench.jsonl").write_text(json.dumps({"task_id": "a/1", "prompt": WORDS}) + "\n")
    trees = {}
    for engine in ("local", "slurm"):
        out = tmp_path / engine
        config = CorpusConfig(
            input=(repos, tmp_path / "packed.tar.gz", tmp_path / "rows.jsonl"), out=out, shard_bytes=8000,
            benchmarks=(tmp_path / "bench.jsonl",), workers=1, cluster=ClusterConfig(engine=engine),
        )  # fmt: skip
        report = build_corpus(config, quiet=True)
        trees[engine] = read_tree(out)
    assert {stage for stage, reasons in report.accounts.dropped.items() if reasons} >= {"screening", "decontamination"}
    assert trees["slurm"] == trees["local"]
