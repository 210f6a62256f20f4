"""The command line: every command has --help; mistakes are one line that names the nearest valid word."""

import contextlib
import importlib
import io
import subprocess
import sys
import time

import pytest

from megacoder.cli.main import COMMANDS, main
from megacoder.core.console import say, table
from megacoder.train.loop import Interrupted
from megacoder.version import __version__


def run(argv, capsys):
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    code, out, _ = run([*command.split(), "--help"], capsys)
    assert code == 0
    assert "usage" in out.lower()


def test_help_lists_every_command(capsys):
    code, out, _ = run([], capsys)
    assert code == 0
    assert all(command in out for command in COMMANDS)


POSITIONAL = {
    "corpus report": ["folder"],
    "data inspect": ["prefix"],
    "checkpoint inspect": ["folder"],
    "checkpoint verify": ["folder"],
    "checkpoint reshard": ["src", "dst"],
    "checkpoint export": ["run", "dst"],
    "checkpoint import": ["src", "dst"],
    "tokenizer extend": ["base"],
    "infill": ["file", "--model", "folder"],
    "report": ["run"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line(command, capsys, tmp_path):
    run_toml = tmp_path / "run.toml"
    run_toml.write_text('output = "o"\n[data]\ntrain = "t"\ntokenizer = "k"\n')
    runs = {name: [str(run_toml)] for name in ("train", "sft", "profile")}
    runs |= {"data digest": [str(run_toml), "--steps", "1:2"], "data show": [str(run_toml), "--step", "1"]}
    first = {**runs, **POSITIONAL}.get(command, [])
    code, _, err = run([*command.split(), *first, "--no-such-option"], capsys)
    assert code == 2
    assert "--no-such-option" in err
    assert err.endswith(f"; see megacoder {command} --help\n")
    assert err.startswith("megacoder: ")
    assert err.count("\n") == 1


def test_the_nearest_option_is_named(capsys):
    assert "did you mean '--minutes'?" in run(["quickstart", "--minuts", "3"], capsys)[2]


@pytest.mark.parametrize(
    ("command", "typo", "meant"),
    [
        ("train", "--print-confg", "--print-config"), ("train", "--nprocs", "--nproc"),
        ("train", "--model.hidden-sise", "--model.hidden-size"), ("sft", "--prepareonly", "--prepare-only"),
    ],
)  # fmt: skip
def test_a_typo_is_held_against_a_commands_own_options_and_the_runs_settings(command, typo, meant, capsys, tmp_path):
    (tmp_path / "run.toml").write_text('output = "o"\n[data]\ntrain = "t"\ntokenizer = "k"\n')
    assert f"did you mean '{meant}'?" in run([command, str(tmp_path / "run.toml"), typo], capsys)[2]


def test_help_on_a_run_tells_of_the_commands_own_options_and_of_the_settings_in_its_file(capsys, tmp_path):
    (tmp_path / "run.toml").write_text('output = "o"\nsteps = 77\n[data]\ntrain = "t"\ntokenizer = "k"\n')
    for command, own in (("train", "--print-config"), ("sft", "--prepare-only"), ("profile", "--synthetic")):
        assert own in run([command, "--help"], capsys)[1]
        assert "--nproc" in run([command, "--help"], capsys)[1]
    _, said, _ = run(["train", str(tmp_path / "run.toml"), "--help"], capsys)
    assert "default: 77" in said
    assert "--schedule.peak-lr" in said


@pytest.mark.parametrize(
    ("word", "hint"), [("quikstart", "quickstart"), ("corpsu", "corpus"), ("data dgest", "data digest")]
)
def test_an_unknown_command_names_the_nearest(word, hint, capsys):
    code, _, err = run(word.split(), capsys)
    assert code == 2
    assert f"unknown command {word!r} (did you mean {hint!r}?)" in err


def test_an_error_of_all_ranks_is_reported_once_by_the_first(monkeypatch, capsys):
    class EndedByTorchrun(BaseException):
        pass

    def sleep(seconds):
        raise EndedByTorchrun

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(EndedByTorchrun):
        main(["nonsense"])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "unknown command 'nonsense'" in run(["nonsense"], capsys)[2]


def test_a_rank_reports_its_error_if_the_first_rank_has_none(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, _, err = run(["nonsense"], capsys)
    assert (code, len(waited)) == (2, 1)
    assert "unknown command 'nonsense'" in err


def test_ranks_that_were_asked_to_stop_end_at_once(monkeypatch, capsys):
    def stopped(words):
        raise Interrupted("stopped")

    monkeypatch.setattr("megacoder.cli.main._dispatch", stopped)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run([], capsys) == (130, "", "")


@pytest.mark.parametrize(
    "words",
    [["generate", "--prompt", "caf\udce9"], ["train", "run.toml", "--output", "caf\udce9"], ["caf\udce9"]],
)
def test_a_word_that_is_not_utf8_is_quoted(words, capsys):
    code, _, err = run(words, capsys)
    assert code == 2
    assert err.startswith("megacoder: 'caf\\udce9' is not UTF-8; ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("told", [lambda: say("nonsense"), lambda: main(["nonsense"])], ids=["say", "an error"])
def test_a_line_is_written_at_once_with_its_line_break(told, monkeypatch):
    class Writes(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    written: list[str] = []
    monkeypatch.setattr("sys.stderr", Writes())
    with contextlib.suppress(SystemExit):
        told()
    assert len(written) == 1
    assert "nonsense" in written[0]
    assert written[0].endswith("\n")


@pytest.mark.parametrize("columns", [40, 100])
def test_no_number_of_a_table_is_cut_by_a_narrow_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table("Layouts", ["tp pp dp", "schedule", "tokens/s", "device-hours"], [["1 1 64", "zbv", "662,784", "53,646"]] * 2)
    out = capsys.readouterr().out
    assert all(out.count(word) == 2 for word in ("1 1 64", "662,784", "53,646"))
    assert ("┃" in out) == (columns == 100)


def test_a_command_group_without_a_subcommand_lists_them(capsys):
    code, _, err = run(["eval"], capsys)
    assert code == 2
    assert "eval infill" in err
    assert "eval perplexity" in err


def test_version(capsys):
    code, out, _ = run(["--version"], capsys)
    assert (code, out) == (0, f"megacoder {__version__}\n")
    out = run(["--version", "--verbose"], capsys)[1]
    assert "torch" in out
    assert "C++ kernels" in out


def test_python_dash_m(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "megacoder", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert shown.stdout == f"megacoder {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_points_at_functions(command):
    module, _, function = COMMANDS[command][0].partition(":")
    assert callable(getattr(importlib.import_module(module), function or "main"))
