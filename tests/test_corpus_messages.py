"""Tasks as JSON: they round-trip, and no other type is ever instantiated."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megacoder.core.errors import ConfigError, FormatError
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.drops import Drop
from megacoder.corpus.messages import from_json, to_json


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 0.1, "text", "\udcff", [1, [2]], (1, ("a",)), {"a": 1, 2: None}, {1, 2}, frozenset({"x"}),
        range(2, 9, 3), Path("a/\udcff"), Counter(a=2), CorpusConfig(input=(Path("in"),), out=Path("out")),
    ],
)  # fmt: skip
def test_values_round_trip(value):
    found = from_json(to_json(value))
    assert (type(found), found) == (type(value), value)


def test_arrays_come_back_inside_of_tasks():
    drop = Drop(stage="s", reason="r", rows=np.array([1, 5], np.int64), details=("x", "y"))
    found = from_json(to_json(drop))
    assert (found.stage, found.details, found.rows.dtype, found.rows.tolist()) == ("s", ("x", "y"), np.int64, [1, 5])
    empty = from_json(to_json(np.zeros((0, 3), np.uint32)))
    assert (empty.dtype, empty.shape) == (np.uint32, (0, 3))


def test_errors_come_back_as_errors():
    found = from_json(to_json(ConfigError("what is wrong")))
    assert (type(found), str(found)) == (ConfigError, "what is wrong")


@pytest.mark.parametrize("value", [print, object(), b"bytes", np.zeros(1, object)])
def test_values_that_are_not_data_are_not_written(value):
    with pytest.raises(TypeError, match="which is not plain data"):
        to_json(value)


@pytest.mark.parametrize(
    "value",
    [
        {".dataclass": ["os", "system", {"command": "touch owned"}]},
        {".dataclass": ["subprocess", "Popen", {"args": "touch owned", "shell": True}]},
        {".dataclass": ["megacoder.corpus.engines", "subprocess", {}]},
        {".dataclass": ["megacoder.corpus.engines", "Path", {}]},
        {".dataclass": ["megacoder.corpus.build", "CorpusConfig", {}]},
        {".dataclass": ["megacoder.corpus.engines", "run_on", {}]},
        {".dataclass": ["megacoder.core.errors", "ConfigError", {}]},
        {".dataclass": ["megacoder.corpus.nowhere", "Task", {}]},
        {".dataclass": ["megacoder.corpus.steps", "Drop", {"stage": "s", "surplus": 1}]},
        {".error": ["Path", "x"]}, {".error": ["__builtins__", "x"]}, {".function": "x"}, {"a": 1}, {},
        {".path": 3}, {".array": ["|O", [1], [1]]}, {".tuple": 5},
    ],
)  # fmt: skip
def test_nothing_else_is_built(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="not a task or a task's result"):
        from_json(json.dumps(value))
    assert list(tmp_path.iterdir()) == []
