"""Which implementation of an op runs, and what MEGACODER_OPS may say."""

import json

import pytest
import torch

from megacoder.cli.main import main
from megacoder.core.errors import ConfigError
from megacoder.ops import backends, cpp
from megacoder.ops.backends import OPS, backend, candidates, op_states, parse_choices
from megacoder.ops.rms_norm import rms_norm_forward


@pytest.fixture
def asked(monkeypatch):
    """Sets what the environment asks for, as a new process would read it."""

    def ask(text):
        monkeypatch.setattr(backends, "_asked", lambda: parse_choices(text))
        candidates.cache_clear()

    yield ask
    candidates.cache_clear()


def test_choices_are_read():
    assert parse_choices("") == {}
    assert parse_choices("rms_norm=torch, attention=flash,") == {"rms_norm": "torch", "attention": "flash"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rms_nrm=torch", "'rms_nrm=torch': did you mean 'rms_norm'"),
        ("rms_norm", "'rms_norm': it is a list of OP=BACKEND"),
        ("rms_norm=fast", "rms_norm has no backend 'fast'; it has cpp, triton, torch"),
    ],
)
def test_a_wrong_choice_is_one_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_choices(text)


def test_every_op_has_the_reference_and_ends_with_it():
    assert all(names[-1] == "torch" for names in OPS.values())
    odd = torch.empty(0, dtype=torch.float64)
    assert {backend(op, odd, able=lambda name: name != "flash") for op in OPS} == {"torch"}


def test_compiled_kernels_come_first_on_a_cpu():
    if not cpp.is_built():
        pytest.skip("the C++ kernels are not built here")
    for dtype in (torch.float32, torch.bfloat16):
        assert {candidates(op, "cpu", dtype)[0] for op, names in OPS.items() if "cpp" in names} == {"cpp"}


def test_what_is_asked_for_runs_or_is_refused(asked):
    asked("rms_norm=torch")
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert candidates("rms_norm", "cpu", torch.float32) == ("torch",)
    rms_norm_forward(x, weight, 1e-6)
    asked("adamw=cuda")
    if not torch.cuda.is_available():
        with pytest.raises(
            ConfigError, match="asks for adamw=cuda: torch sees no GPU here; adamw has cpp, cuda, torch"
        ):
            candidates("adamw", "cpu", torch.float32)


def test_a_backend_that_cannot_do_the_rest_is_named(asked):
    asked("attention=flash")
    with pytest.raises(ConfigError, match="attention=flash does not serve all of this run"):
        backend("attention", torch.empty(0), able=lambda name: False)


def test_states_say_why():
    states = op_states("cpu", torch.float32)
    assert {state.op for state in states} == OPS.keys()
    assert all(state.reason for state in states)
    for op in OPS:
        assert sum(state.chosen for state in states if state.op == op) == 1


def test_the_command_prints_the_same(capsys):
    main(["ops", "--json", "--device", "cpu", "--dtype", "float32"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["op"], row["backend"]) for row in rows] == [(op, name) for op, names in OPS.items() for name in names]
    main(["ops", "--device", "cpu"])
    assert "rms_norm" in capsys.readouterr().out
