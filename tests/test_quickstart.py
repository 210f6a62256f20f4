"""The full pipeline in small: every stage, resumed after an interruption, refused where it cannot work."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from html_reader import Reader
from train_cases import functions

from megacoder.cli.quickstart import recipe, stages
from megacoder.cli.quickstart.options import Paths
from megacoder.cli.quickstart.recipe import MEDIUM, SMALL, choose_recipe, seconds_per_step, steps_within
from megacoder.core.config import load_toml
from megacoder.core.device import Machine, faster_dtype, probe
from megacoder.parallel.flat import FlatParameters
from megacoder.train.config import RunConfig
from megacoder.train.metrics_log import read_metrics


def command(*arguments):
    return [sys.executable, "-m", "megacoder", "quickstart", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=280)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Four repositories of small Python files that import each other."""
    root = tmp_path_factory.mktemp("sources")
    for index, name in enumerate(["alpha", "beta", "gamma", "delta"]):
        package = root / name / name
        package.mkdir(parents=True)
        for number, text in enumerate(functions(12, first=20 * index)):
            uses = f"from {name}.part{number - 1} import add_{20 * index + number - 1}\n\n\n" if number else ""
            (package / f"part{number}.py").write_text(uses + text)
    return root


def arguments(sources, out):
    return ["--input", sources, "--out", out, "--steps", 6, "--vocab-size", 512, "--nproc", 2]


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "q"
    done = run(*arguments(sources, out))
    assert done.returncode == 0, done.stderr
    return out, done


def curve(out):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(out / "run" / "metrics.jsonl")]


def test_the_memory_of_timing_a_microbatch_is_free_before_ranks_start(tmp_path, monkeypatch):
    """What PyTorch's allocator keeps of it on a GPU is returned, once nothing holds it."""
    held, alive = [], []

    def recorded(*args, **kwargs):
        flat = FlatParameters(*args, **kwargs)
        held.extend(map(weakref.ref, (flat.weight, flat.grad)))
        return flat

    monkeypatch.setattr(recipe, "FlatParameters", recorded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append([tensor() is not None for tensor in held]))
    config = recipe.run_config(
        SMALL, Paths(tmp_path), steps=1, nproc=2, dtype=torch.float32, vocab_size=512, seed=1
    )  # fmt: skip
    assert seconds_per_step(config, probe(), nproc=2) > 0
    assert alive == [[False, False]]


def test_every_stage_leaves_its_output(finished):
    out, done = finished
    for path in ("corpus/corpus.json", "tokenizer/tokenizer.json", "data/train.bin", "data/heldout.idx", "run.toml",
                 "run/metrics.jsonl", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
                 "evaluation.json", "infill.jsonl", "report.html"):  # fmt: skip
        assert (out / path).stat().st_size > 0, path
    assert [step for step, _, _ in curve(out)] == [1, 2, 3, 4, 5, 6]
    assert done.stdout.count("truth |") == 3
    difference = float(re.search(r"logits differ by ([0-9.e+-]+)", done.stdout).group(1))
    assert difference < 1e-4


def test_lines_are_asked_for_in_the_order_of_training(finished, tmp_path, monkeypatch):
    out, done = finished
    assert f"megacoder infill --model {out / 'model'} --spm FILE" in done.stdout
    assert "rate 0.5, suffix first." in (out / "report.html").read_text()
    shutil.copytree(out, tmp_path / "q", ignore=shutil.ignore_patterns("evaluation.json", "run"))
    asked = []

    def noted(*args, spm, **options):
        asked.append(spm)
        raise InterruptedError

    monkeypatch.setattr(stages, "fill_lines", noted)
    text = (out / "run.toml").read_text()
    for path in (out / "run.toml", tmp_path / "earlier.toml"):
        (tmp_path / "earlier.toml").write_text(text.replace("spm_rate = 1.0", "spm_rate = 0.0"))
        with pytest.raises(InterruptedError):
            stages.make_evaluation(Paths(tmp_path / "q"), load_toml(RunConfig, path))
    assert asked == [True, False]


def test_the_report_is_one_self_contained_file(finished):
    text, reader = (finished[0] / "report.html").read_text(encoding="utf-8"), Reader()
    reader.feed(text)
    assert (reader.open, reader.sources) == ([], [])
    assert "xz -9" in text
    assert text.count("<svg") == 2


def test_a_second_run_does_nothing_again(sources, finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}
    assert run(*arguments(sources, out)).returncode == 0
    after = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}
    assert {path for path in before if before[path] != after.get(path)} <= {out / "report.html"}
    assert before.keys() == after.keys()


def test_interrupted_anywhere_the_same_command_completes_the_same_run(sources, finished, tmp_path):
    out = tmp_path / "q"
    for landmark in ("corpus/corpus.json", "data/train.idx", "run/checkpoints/latest"):
        process = subprocess.Popen(command(*arguments(sources, out)), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not (out / landmark).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
        # 130 to a shell either way: CPython ends by the signal itself where that met the text of an `exec`, as in a
        # dataclass that is being made, whoever caught the exception afterwards
        assert process.returncode in (130, -signal.SIGINT), stderr
        assert "megacoder: interrupted" in stderr or "stopped" in stderr, stderr
        assert "Traceback" not in stderr
    assert run(*arguments(sources, out)).returncode == 0
    assert curve(out) == curve(finished[0])
    assert not list(out.rglob("*.tmp-*"))


def test_installed_or_removed_packages_do_not_affect_a_finished_folder(finished, sources):
    added = sources / "newcomer"
    added.mkdir()
    (added / "module.py").write_text("def newcomer():\n    return 'came later'\n" * 20)
    try:
        assert run(*arguments(sources, finished[0])).returncode == 0
    finally:
        (added / "module.py").unlink()
        added.rmdir()


def test_a_folder_of_other_options_is_refused(sources, finished):
    out, _ = finished
    done = run("--input", sources, "--out", out, "--steps", 7, "--vocab-size", 512, "--nproc", 2)
    assert done.returncode == 2
    assert done.stderr == f"megacoder: {out}/quickstart.toml was made with steps = 6, not 7; choose another --out\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "is empty"),
        (lambda root: (root / "notes.txt").write_text("no code"), "neither source files"),
        (lambda root: (root / "binary.py").write_bytes(b"\x00\x01" * 100), "binary|NUL"),
        (lambda root: (root / "latin.py").write_bytes(b"x = '\xe9'\n" * 30), "encoding unknown"),
    ],
    ids=["empty", "no source", "binary", "not UTF-8"],
)
def test_sources_with_nothing_to_learn_from_are_refused(tmp_path, make, message):
    root = tmp_path / "sources"
    root.mkdir()
    make(root)
    done = run("--input", root, "--out", tmp_path / "q", "--steps", 2)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("megacoder: ")
    assert re.search(message, line), line
    assert not [path for path in (tmp_path / "q").rglob("*") if path.is_file()]


def test_a_missing_folder_is_named(tmp_path):
    done = run("--input", tmp_path / "nowhere", "--out", tmp_path / "q")
    assert done.returncode != 0
    assert "nowhere" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="a small tmpfs needs root")
@pytest.mark.parametrize("kilobytes", [40, 160, 1500])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(sources, tmp_path, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = run(*arguments(sources, disk / "q"))
        assert done.returncode not in (0, 130)
        assert "No space left" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("megacoder: "), done.stderr
        assert not list(disk.rglob("*.tmp-*"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_steps_fall_on_a_coarse_ladder():
    assert [steps_within(1, seconds, overhead=1.0) for seconds in (0.6, 0.59, 0.41, 0.39, 7, 100)] == [
        100, 100, 125, 150, 8, 1
    ]  # fmt: skip


def test_the_recipe_follows_machine_and_time():
    cpu = Machine(device_type="cpu", device_name="x", num_devices=1, num_cores=2)
    assert choose_recipe(cpu, 5) is SMALL
    assert choose_recipe(cpu, 90) is MEDIUM
    gpu = Machine(device_type="cuda", device_name="x", num_devices=1, num_cores=2)
    assert choose_recipe(gpu, 5).model.hidden_size > MEDIUM.model.hidden_size


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_faster_dtype_is_chosen(slow, monkeypatch):
    multiply = torch.mm

    def mm(a, b):
        if a.dtype == slow:
            time.sleep(0.3)
        return multiply(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    cpu = Machine(device_type="cpu", device_name="x", num_devices=1, num_cores=2)
    assert faster_dtype(cpu, rows=8, width=8, trials=2) != slow
