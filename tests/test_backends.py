"""Which implementation of an op runs, and which values MEGACODER_OPS accepts."""

import functools
import json
import sys
import types

import pytest
import torch

from megacoder.cli.main import main
from megacoder.core.errors import ConfigError
from megacoder.ops import backends, cpp, linear
from megacoder.ops.backends import OPS, backend, candidates, op_states, parse_choices
from megacoder.ops.fused_attention import choose_flash
from megacoder.ops.rms_norm import rms_norm_forward


def test_choices_are_read():
    assert parse_choices("") == {}
    assert parse_choices("rms_norm=torch, attention=flash,") == {"rms_norm": "torch", "attention": "flash"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rms_nrm=torch", "'rms_nrm=torch' .did you mean 'rms_norm'"),
        ("rms_norm", "'rms_norm': expected a list of OP=BACKEND"),
        ("rms_norm=fast", "rms_norm has no backend 'fast'; it has cpp, triton, torch"),
        ("rms_norm=torch,rms_norm=cpp", "rms_norm is given twice, torch and cpp"),
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
        first = {op: candidates(op, "cpu", dtype)[0] for op, names in OPS.items() if "cpp" in names}
        tiles = {"attention", "weight_grad"} if cpp.has_amx() and dtype == torch.bfloat16 else set()
        assert first == {op: "amx" if op in tiles else "cpp" for op in first}


def test_without_amx_its_kernels_are_left_out_with_a_reason(asked, monkeypatch):
    monkeypatch.setattr(cpp, "has_amx", lambda: False)
    asked("")
    reasons = {state.reason for state in op_states("cpu", torch.bfloat16) if state.backend == "amx"}
    if cpp.is_built():
        assert reasons == {"not offered by this processor and its system"}
        assert candidates("attention", "cpu", torch.bfloat16)[0] == "cpp"
    asked("attention=amx")
    with pytest.raises(ConfigError, match="asks for attention=amx: "):
        candidates("attention", "cpu", torch.bfloat16)


def test_the_requested_backend_runs_or_is_refused(asked):
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
    with pytest.raises(ConfigError, match="attention=flash does not support all of this run"):
        backend("attention", torch.empty(0), able=lambda name: False)


def pretend(monkeypatch, *modules, capability=(9, 0)):
    """A GPU of that capability, on which `modules` can be imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(backends, "_cannot_import", lambda name: None if name in modules else f"no module {name}")
    candidates.cache_clear()


FLASH3, FLASH4 = "flash_attn_interface", "flash_attn.cute.interface"


@pytest.mark.parametrize(
    ("capability", "modules", "attention"),
    [
        ((9, 0), (), ("cudnn", "flash", "torch")),
        ((9, 0), (FLASH3,), ("cudnn", "flash3", "flash", "torch")),
        ((9, 0), (FLASH3, FLASH4), ("cudnn", "flash3", "flash4", "flash", "torch")),
        ((10, 0), (FLASH3, FLASH4), ("cudnn", "flash4", "flash", "torch")),
        ((8, 0), (FLASH3, FLASH4), ("flash", "torch")),
    ],
)
def test_optional_packages_are_used_if_installed(capability, modules, attention, asked, monkeypatch):
    asked("")
    pretend(monkeypatch, *modules, capability=capability)
    assert candidates("attention", "cuda", torch.bfloat16) == attention
    assert candidates("weight_grad", "cuda", torch.bfloat16) == ("cublas", "torch")
    pretend(monkeypatch, "fused_weight_gradient_mlp_cuda", capability=capability)
    assert candidates("weight_grad", "cuda", torch.bfloat16) == ("cublas", "apex", "torch")


def test_a_requested_but_missing_package_is_named(asked, monkeypatch):
    pretend(monkeypatch)
    asked("attention=flash4")
    with pytest.raises(ConfigError, match=r"attention=flash4: no module flash_attn\.cute\.interface"):
        candidates("attention", "cuda", torch.bfloat16)


@pytest.mark.parametrize("error", ["ImportError('of another torch')", "AttributeError('broken')"])
def test_a_broken_package_is_a_reason_not_an_error(error, tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert backends._cannot_import("broken_package") == error.replace("('", ": ").replace("')", "")
    assert backends._cannot_import("nobody.cute") == "ModuleNotFoundError: No module named 'nobody'"
    assert backends._cannot_import("torch.nn.attention") is None


def test_flash_kernels_are_registered_behind_torchs_ops_and_removed(monkeypatch):
    calls = []

    class Handle:
        def remove(self):
            calls.append("removed")

    registry = torch.nn.attention._registry
    for kernels in ("FA3", "FA4"):
        register = functools.partial(lambda kernels: calls.append(kernels) or Handle(), kernels)
        monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, kernels, register)
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_ACTIVE", None)
    for name in ("flash", "flash3", "flash3", "flash4", "flash", "flash"):
        choose_flash(name)
    assert calls == ["FA3", "removed", "FA4", "removed"]


def test_apex_adds_to_the_gradient(monkeypatch):
    """Its function has this order of arguments in Megatron-LM, whose gradient fusion it is."""

    def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
        assert main_grad.dtype == torch.float32
        main_grad += grad_output.t().float() @ total_input.float()

    apex = types.SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", apex)
    grad, x, before = torch.randn(7, 3).bfloat16(), torch.randn(7, 5).bfloat16(), torch.randn(3, 5)
    sums = []
    for name in ("apex", "torch"):
        monkeypatch.setattr(linear, "backend", lambda *_, name=name: name)
        sums.append(before.clone())
        linear.accumulate_weight_grad(sums[-1], grad, x)
    assert torch.allclose(*sums, atol=0.05)
    assert not torch.equal(sums[0], before)


def test_op_states_give_their_reasons():
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
