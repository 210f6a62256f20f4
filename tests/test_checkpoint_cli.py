"""`megacoder checkpoint inspect` and `verify` as people and scripts use them."""

import json
import random

import pytest
from checkpoint_cases import (
    flip_a_byte,
    lay_out,
    make_tensors,
    no_flush,  # noqa: F401
    save_as_ranks,
)
from command_line import run_command

from megacoder.checkpoint import folders, reader, tensor_file
from megacoder.cli import checkpoint as checkpoint_command
from megacoder.cli.main import main


@pytest.fixture
def root(tmp_path):
    for step in (10, 20):
        save_as_ranks(tmp_path, step, lay_out(make_tensors(), tp=1, dp=2, random=random.Random(0)), {"cursor": 5})
    return tmp_path


def run(capsys, *words):
    return run_command(capsys, "checkpoint", *words)


def test_inspect_shows_the_newest_as_a_table(root, capsys):
    code, out, _ = run(capsys, "inspect", root)
    assert code == 0
    assert "step 20; ranks 2" in " ".join(out.split())
    elements = 1 + 7 + 45 + 4 + 60
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        row = next(line for line in out.splitlines() if f" {kind} " in line)
        assert [word for word in row.split() if word.isdigit()][:3] == ["6", str(elements), str(4 * elements)]
    assert "rank-00001-of-00002.safetensors" in out


def test_inspect_as_json(root, capsys):
    code, out, _ = run(capsys, "inspect", root / "step-00000010", "--json")
    assert code == 0
    whole = json.loads(out)
    assert (whole["step"], whole["layout"], whole["state"]) == (10, {"ranks": 2}, {"cursor": 5})
    assert whole["kinds"]["exp_avg"]["tensors"] == 6
    assert {"kind": "weight", "name": "scalar", "shape": [], "dtype": "F32", "pieces": 1} in whole["tensors"]
    assert list(whole["files"]) == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]


def test_verify_says_that_all_is_well(root, capsys):
    code, out, err = run(capsys, "verify", root)
    assert (code, err) == (0, "")
    assert [line.split(": ")[1] for line in out.splitlines()] == ["every byte is as it was written"] * 2


def test_verify_names_each_bad_file_and_exits_with_1(root, capsys):
    path = root / "step-00000010" / "rank-00001-of-00002.safetensors"
    flip_a_byte(path)
    (root / "step-00000020" / "rank-00000-of-00002.safetensors").unlink()
    code, out, err = run(capsys, "verify", root)
    assert code == 1
    assert f"{path}: bytes 0 to {path.stat().st_size} are not what was written" in out
    assert f"{root / 'step-00000020' / 'rank-00000-of-00002.safetensors'}: No such file" in out
    listed = "damaged, as listed above; restore those files, or move the checkpoints that hold them away"
    assert err == f"megacoder: {root}: {listed}\n"
    assert run(capsys, "verify", root / "step-00000010")[0] == 1


@pytest.mark.parametrize("content", ["step-00000030\n", "step-0000\0020\n", "\xff", ""])
def test_verify_names_a_latest_that_names_nothing(root, capsys, content):
    (root / "latest").write_text(content, encoding="latin-1")
    code, out, _ = run(capsys, "verify", root)
    assert code == 1
    assert f"{root / 'latest'}: names " in out
    (root / "latest").write_text("step-00000010\n")  # behind, as a kill may leave it
    assert run(capsys, "verify", root)[0] == 0
    (root / "latest").unlink()
    assert run(capsys, "verify", root)[0] == 0


MOMENTS = {
    "before it is opened": (checkpoint_command, "verify_checkpoint"),
    "once its manifest is read": (reader, "folder_faults"),
    "while its files are looked for": (folders, "size_fault"),
    "once all its files are there": (tensor_file, "size_fault"),
    "once latest is read": (folders, "_named_by_latest"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_verify_counts_no_checkpoint_that_the_run_removes_meanwhile(tmp_path, capsys, monkeypatch, moment):
    def save(step):
        save_as_ranks(tmp_path, step, lay_out(make_tensors(), tp=1, dp=2, random=random.Random(0)))

    (module, name), removed = MOMENTS[moment], []
    real = getattr(module, name)

    def remove_meanwhile(*words):
        found = real(*words) if name == "_named_by_latest" else None
        if not removed:
            removed.append("at once, since saving comes here too")
            save(30)
            removed[:] = folders.rotate(tmp_path, step=30, keep_last=1, keep_every=None)
        return found or real(*words)

    save(10)
    save(20)
    monkeypatch.setattr(module, name, remove_meanwhile)
    code, out, err = run(capsys, "verify", tmp_path)
    assert (code, err) == (0, ""), out
    assert len(removed) == 2
    if name != "_named_by_latest":
        told = "removed meanwhile, by the run that writes here"
        assert [line.split(": ")[1] for line in out.splitlines()] == [told] * 2


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_without_checkpoints_exits_with_1(tmp_path, capsys, command):
    code, out, err = run(capsys, command, tmp_path / "absent")
    assert code == 1
    assert "absent" in out + err
    assert err.count("\n") == 1


def test_other_files_are_not_reported_as_damaged_checkpoints(tmp_path, capsys):
    (tmp_path / "corpus.json").touch()
    code, out, err = run(capsys, "verify", tmp_path)
    assert (code, out, err) == (1, "", f"megacoder: {tmp_path}: holds no complete checkpoint\n")


@pytest.mark.parametrize("step", [15, -1])
def test_a_missing_step_names_the_existing_ones(root, capsys, step):
    code, _, err = run(capsys, "export", root, root / "hf", "--step", step)
    assert (code, err) == (1, f"megacoder: {root}: no checkpoint of step {step}; there are 10, 20\n")
    code, _, err = run(capsys, "export", root / "step-00000010", root / "hf", "--step", step)
    assert err.endswith(f"no checkpoint of step {step}; there are none\n")


def test_many_steps_are_named_by_their_range(tmp_path, capsys):
    for step in range(1, 12):
        (tmp_path / f"step-{step:08d}").mkdir()
    _, _, err = run(capsys, "export", tmp_path, tmp_path / "hf", "--step", 12)
    assert err.endswith("there are 1, 2, 3, 4, ..., 8, 9, 10, 11\n")


def test_help_lists_the_commands(capsys):
    main(["--help"])
    assert "checkpoint verify" in capsys.readouterr().out
