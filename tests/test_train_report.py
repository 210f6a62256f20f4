"""The report of a run agrees with the run's files, and is one file that fetches nothing."""

import base64
import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from command_line import refusal
from html_reader import Reader
from train_cases import make_case, run

from megacoder.cli.main import main
from megacoder.core.html import Series, line_chart
from megacoder.data.blend import blend_counts, blend_table
from megacoder.data.permutation import stream_phase
from megacoder.parallel.config import ParallelConfig
from megacoder.train.metrics_log import read_metrics


@pytest.mark.parametrize(("weights", "num_streams"), [([1.0], 1), ([0.7, 0.1, 0.2], 8), ([1, 2, 3, 1.5], 16)])
@pytest.mark.parametrize("num_windows", [0, 5, 64, 1003])
def test_counts_of_blended_windows_are_those_drawn(weights, num_streams, num_windows):
    table = blend_table(weights)
    counted = [0] * len(weights)
    for window in range(num_windows):
        phase = stream_phase(window % num_streams, num_streams, len(table))
        counted[table[(window // num_streams + phase) % len(table)]] += 1
    counts = blend_counts(table, num_windows=num_windows, num_streams=num_streams, num_datasets=len(weights))
    assert counts == counted


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory):
    """A run on two pipeline ranks, over two datasets of which one is named to be escaped."""
    case = make_case(tmp_path_factory.mktemp("report"))
    for suffix in (".bin", ".idx", ".json"):
        if (source := case.folder / f"train{suffix}").exists():
            (case.folder / f"more <b> & such{suffix}").write_bytes(source.read_bytes())
    data = {"train": (case.folder / "train", case.folder / "more <b> & such"), "weights": (3.0, 1.0)}
    config = case.config("run", steps=6, eval_every=3, parallel=ParallelConfig(pp=2), data=data)
    ranks.run(2, run, config)
    return config


def report_of(folder, *arguments):
    main(["report", str(folder), *arguments])
    reader = Reader()
    text = (Path(arguments[1]) if arguments else folder / "report.html").read_text()
    reader.feed(text)
    assert not reader.open
    return reader, text


def test_the_report_shows_the_logged_metrics(finished, capsys):
    reader, text = report_of(finished.output)
    assert f"{finished.output}/report.html: as of step 6" in capsys.readouterr().err
    rows = read_metrics(finished.output / "metrics.jsonl")
    shown = " ".join(reader.texts)
    assert f"{rows[-1]['loss']:.3f}" in reader.texts
    assert f"{rows[-1]['held_out_loss']:.3f}" in reader.texts
    assert "The newest complete one is of step 6." in shown
    assert "No update was skipped." in shown
    for convention in ("full attention (PaLM)", "causal attention"):
        median = statistics.median(row[f"tflops_per_device/{convention}"] for row in rows)
        assert f"TFLOP/s per device, {convention}, median {median:,.3g} " in f"{shown} "
    assert "MFU" not in shown, "nobody knows this device's peak"
    assert "tp 1" in shown
    assert "pp 2" in shown
    assert re.search(r"dataset target share .* 75\.00% 75\.00% 1,152 .* 25\.00% 25\.00% 384", shown), shown
    assert "<b> & such" in shown, "names are text"
    assert text.count("<polyline") == 7, "loss twice, rate, norm, speed, memory, checkpoints"
    assert "<script" not in text


def test_the_report_fetches_nothing_and_embeds_a_valid_picture(finished):
    reader, _ = report_of(finished.output)
    assert len(reader.sources) == 1
    kind, _, data = reader.sources[0].partition(";base64,")
    assert kind == "data:image/svg+xml"
    drawn = ET.fromstring(base64.b64decode(data))
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert "rank 1" in texts
    assert texts[0].startswith("1f1b: 2 ranks, 4 microbatches")


def test_the_picture_is_of_what_the_ranks_run(finished, tmp_path):
    """Weight gradients that would bring back what is recomputed are not drawn as postponed."""
    copied = shutil.copytree(finished.output, tmp_path / "run")
    text, shown = (copied / "run.toml").read_text(), []
    for recompute, layers in (("none", "[1, 1]"), ("full", "[1, 1]"), ("full", "[1, 1, 1]")):
        changed = text.replace('schedule = "1f1b"', f'schedule = "zb-h1"\nlayers_per_stage = {layers}')
        (copied / "run.toml").write_text(changed.replace('recompute = "none"', f'recompute = "{recompute}"'))
        reader, _ = report_of(copied)
        drawn = [base64.b64decode(source.partition(";base64,")[2]).decode() for source in reader.sources]
        shown.append((" ".join(reader.texts), drawn))
    assert "weight" in shown[0][1][0]
    assert shown[1][1] != shown[0][1]
    assert "weight" not in shown[1][1][0]
    assert "Settings have changed since then" in shown[2][0]
    assert shown[2][1] == []


def test_a_run_that_has_only_begun_and_one_that_went_wrong(finished, tmp_path, capsys):
    """Without a checkpoint, and with values that were not finite."""
    (tmp_path / "run.toml").write_bytes((finished.output / "run.toml").read_bytes())
    refusal(capsys, "report", tmp_path)
    base = '"lr": 0.1, "tokens": 10, "tokens_per_second": 5.0, "tflops": 1.0, "memory_gib": 0.1, '
    lines = [
        f'{{"step": 1, "loss": 2.0, "grad_norm": 1.0, {base} "skipped_updates": 0}}',
        f'{{"step": 2, "loss": null, "grad_norm": null, {base} "skipped_updates": 1}}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    reader, _ = report_of(tmp_path, "--out", str(tmp_path / "other.html"))
    shown = " ".join(reader.texts)
    assert "2 1 not finite not finite" in shown
    assert "TFLOP/s of all devices, causal attention, median 1 " in shown, "as an older version has logged it"
    used = {"mfu/causal attention": 0.5, "tflops_per_device/causal attention": 2}
    rows = [{**json.loads(line), **used} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], *map(json.dumps, rows)]) + "\n")
    reader, _ = report_of(tmp_path, "--out", str(tmp_path / "other.html"))
    shown = " ".join(reader.texts)
    assert "TFLOP/s per device, causal attention, median 2 MFU, causal attention, median 50.0% " in shown
    assert "of all devices" not in shown
    assert shown.count("Known from the first checkpoint on.") == 2
    assert "2.000" in reader.texts


def test_a_file_instead_of_the_runs_folder_is_refused(finished, capsys):
    toml = finished.output / "run.toml"
    said = f"megacoder: {toml} is a file; expected the folder of a run, the `output` of its settings\n"
    assert refusal(capsys, "report", toml, code=2) == said


def test_a_chart_of_zeros_starts_at_zero_with_room_for_labels():
    lines = [Series(name, [(1.0, 0.0), (2.0, 0.0)]) for name in ("0%", "50% PSM", "100% PSM")]
    chart = ET.fromstring(line_chart(lines, y_label="lines filled in exactly, %"))
    texts = {text.text: float(text.get("x")) for text in chart.iter("text")}
    assert not any(text.startswith("-") for text in texts)
    swatches = [float(line.get("x1")) for line in chart.iter("line") if line.get("stroke").startswith("var(--s")]
    for name, begin in zip(("0%", "50% PSM", "100% PSM"), sorted(swatches), strict=True):
        assert texts[name] == begin + 21
    ends = [texts[line.name] + 9 * len(line.name) for line in lines]  # a wide face takes 9 for a character
    assert all(end < begin for end, begin in zip(ends, sorted(swatches)[1:], strict=False))
