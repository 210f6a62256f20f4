"""Configuration: defaults, TOML, command line; every mistake is one line that names the nearest valid key or value."""

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from megacoder.core.config import check_same, from_dict, load_toml, parse_args, to_dict, to_toml
from megacoder.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 0.1
    """rate"""
    kind: Literal["a", "b"] = "a"
    """kind"""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Help."""

    name: str
    """name"""
    folders: tuple[Path, ...] = ()
    """folders"""
    steps: int | None = None
    """steps"""
    shares: tuple[float, ...] = ()
    """shares"""
    flag: bool = False
    """flag"""
    inner: Inner = field(default_factory=Inner)
    """inner"""


@dataclass(frozen=True, kw_only=True)
class WithPositional:
    target: tyro.conf.Positional[str]
    """target"""


def test_options_of_a_nested_dataclass_may_be_flat():
    words = ["--name", "n", "--kind", "b"]
    assert parse_args(Outer, words, prog="p", flat=True) == Outer(name="n", inner=Inner(kind="b"))
    with pytest.raises(ConfigError, match=r"unknown option '--kidn' \(did you mean '--kind'\?\); see p --help"):
        parse_args(Outer, ["--name", "n", "--kidn", "b"], prog="p", flat=True)


@dataclass(frozen=True, kw_only=True)
class LongHelp:
    """Help."""

    first: int = 1
    """one two
    `three` four"""


def test_a_docstring_of_two_lines_is_one_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_args(LongHelp, ["--help"], prog="p")
    assert "one two `three` four" in capsys.readouterr().out


def test_missing_required_options_are_named(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("steps = 3\n")
    with pytest.raises(ConfigError, match=r"run\.toml: name must be given$"):
        load_toml(Outer, path)


def test_command_line_overrides_toml_overrides_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('name = "n"\nfolders = ["x", "y"]\n[inner]\nlr = 1\n')
    config = parse_args(Outer, ["--inner.kind", "b", "--steps", "3"], prog="p", default=load_toml(Outer, path))
    assert config == Outer(name="n", folders=(Path("x"), Path("y")), steps=3, inner=Inner(lr=1.0, kind="b"))


@given(
    st.builds(
        Outer,
        name=st.text(st.characters(exclude_categories=["Cs"])),
        folders=st.lists(st.sampled_from([Path("a b"), Path("c")])).map(tuple),
        steps=st.none() | st.integers(0, 10**12),
        flag=st.booleans(),
        inner=st.builds(Inner, lr=st.floats(allow_nan=False)),
    )
)
def test_toml_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_toml(Outer, path) == config
    assert from_dict(Outer, to_dict(config), where="w") == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--name", "n", "--stps", "3"], "unknown option '--stps' (did you mean '--steps'?)"),
        (["--name", "n", "--kind", "b"], "unknown option '--kind' (did you mean '--inner.kind'?)"),
        (["--name", "n", "--inner.kin", "b"], "unknown option '--inner.kin' (did you mean '--inner.kind'?)"),
        (["--name", "n", "--steps", "three"], "--steps 'three': expected a whole number; see"),
        (["--name", "n", "--steps=1:3"], "--steps '1:3': expected a whole number; see"),
        (["--name", "n", "--inner.lr", "x"], "--inner.lr 'x': expected a number; see"),
        (["--name", "n", "--shares", "1", "x", "--steps", "3"], "--shares 'x': expected a number; see"),
        (["--name", "n", "--inner.kind", "c"], "--inner.kind 'c': expected one of 'a', 'b'; see"),
        (["--name", "n", "--steps"], "--steps needs a value; see"),
        ([], "--name is missing; see"),
        (["--steps", "3", "--inner.lr", "1"], "--name is missing; see"),
        (["--nam", "n"], "--name is missing; unknown option '--nam' (did you mean '--name'?); see"),
        (["--no-flag", "--inner.lr=1"], "--name is missing; see"),
        (["--name", "n", "stray"], "unknown option 'stray'"),
        (["--name", "n", "true"], "'true' after a switch: --name turns it on, --no-name off"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # by which tyro draws its boxes
def test_a_bad_command_line_is_one_line(argv, message, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ConfigError) as caught:
        parse_args(Outer, argv, prog="megacoder thing")
    assert message in str(caught.value)
    assert "megacoder thing --help" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('nam = "n"', "unknown key 'nam' (did you mean 'name'?)"),
        ('name = "n"\n[inner]\nlrr = 1', "inner: unknown key 'lrr' (did you mean 'lr'?)"),
        ("name = 3", "name = 3: expected str"),
        ('name = "n"\nsteps = true', "steps = True: expected int"),
        ('name = "n"\nfolders = 3', "folders = 3: expected a list"),
        ('name = "n"\ninner = 1', "inner = 1: expected a table"),
        ('name = "n"\n[inner]\nkind = "c"', "kind = 'c': expected one of 'a', 'b'"),
        ("name = ", "not readable as TOML"),
        ("", "name"),
    ],
)
def test_a_bad_toml_file_gives_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_toml(Outer, path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_toml_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_toml(Outer, tmp_path / "none.toml")


def test_a_missing_positional_argument_is_described():
    with pytest.raises(ConfigError, match=r"^STR \(target\) is missing; see p --help$"):
        parse_args(WithPositional, [], prog="p")


def test_positional_arguments():
    assert parse_args(WithPositional, ["here"], prog="p").target == "here"


def test_check_same_names_the_nested_key():
    old, new = Outer(name="n"), Outer(name="n", inner=Inner(lr=0.2), steps=4)
    with pytest.raises(ConfigError, match=r"folder was made with inner.lr = 0.1, not 0.2; choose"):
        check_same(old, new, where="folder", free={"steps"}, advice="choose another")
    check_same(old, new, where="folder", free={"steps", "inner"}, advice="")
