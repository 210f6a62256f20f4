"""The fp8 kernels and products of a GPU against the emulation in torch, which tests/test_fp8.py compares with fp64."""

import itertools
import math

import pytest
import torch
from test_gpu import shape_of
from tiny_models import make_model

from megacoder.model.stage import Microbatch, Stage
from megacoder.ops.backends import candidates
from megacoder.ops.fp8 import E4M3, E5M2, fp8_cast, fp8_product, largest_magnitude
from megacoder.ops.linear import STORED, Precision, accumulate_weight_grad, linear_forward, linear_input_grad
from megacoder.parallel.flat import FlatParameters

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU that multiplies fp8: sm_89 and up",
)

FP8 = Precision(fp8=True)
SIZES = [(16, 16, 16), (48, 272, 144), (528, 1040, 80), (4096, 2048, 5504)]  # (T, I, O)


@pytest.fixture
def emulated(asked):
    """Runs a call on torch's path."""

    def run(call):
        asked("fp8_cast=torch,fp8_product=torch")
        result = call()
        asked("")
        return result

    return run


def randn(*shape, seed=0, spread=2.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = [torch.randn(shape, generator=generator, device="cuda") for _ in range(2)]
    return (draw[0] * torch.exp2(draw[1] * spread)).bfloat16()


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_the_gpu_kernels_are_the_first_choice():
    assert candidates("fp8_cast", "cuda", torch.bfloat16)[0] == "cuda"
    assert candidates("fp8_product", "cuda", torch.bfloat16)[0] == "scaled_mm"


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (48, 272), (1040, 144), (4096, 5504)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e-3, 1.0, 1e30])
def test_casts_equal_the_emulation_to_the_bit(shape, dtype, scale, emulated):
    x = randn(*shape) * scale
    found, expected = fp8_cast(x, dtype), emulated(lambda: fp8_cast(x, dtype))
    assert torch.equal(largest_magnitude(x), emulated(lambda: largest_magnitude(x)))
    assert torch.equal(found.inverse_scale, expected.inverse_scale)
    assert same_bits(found.rows_RC, expected.rows_RC)
    assert same_bits(found.columns_CR, expected.columns_CR)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_values_survive(bad):
    x = randn(256, 512)
    x[200, 3] = bad
    factor, other = fp8_cast(x, E4M3), fp8_cast(randn(128, 512, seed=1), E4M3)
    assert factor.inverse_scale.isnan()
    for dtype in (torch.bfloat16, torch.float32):
        scales = factor.inverse_scale, other.inverse_scale
        assert fp8_product(factor.rows_RC, other.rows_RC, scales, dtype=dtype, fast_sums=True).isnan().all()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SIZES)
def test_the_three_gemms(tokens, inputs, outputs, emulated):
    """Both round to bf16, which leaves 2e-3 between them; sums in the tensor cores are allowed as much again."""
    x, weight = FP8.input(randn(tokens, inputs)), FP8.weight(randn(outputs, inputs, seed=1))
    grad = FP8.grad(randn(tokens, outputs, seed=2))
    total, expected_total = (torch.full((outputs, inputs), 3.0, device="cuda") for _ in range(2))
    accumulate_weight_grad(total, grad, x)
    emulated(lambda: accumulate_weight_grad(expected_total, grad, x))
    assert relative(total - 3, expected_total - 3) <= 1e-3
    for call in (lambda: linear_forward(x, weight), lambda: linear_input_grad(grad, weight)):
        assert call().dtype == torch.bfloat16
        assert relative(call(), emulated(call)) <= 4e-3


@pytest.mark.parametrize("inner", [2048, 5504, 32768])
def test_fast_sums_lose_less_than_the_casts(inner):
    """By the rounding of e4m3 a product is 3.7% off; what sums lose on top must not show beside it.

    Fast sums are for the forward alone, whose longest have F terms.
    """
    a, b = fp8_cast(randn(512, inner, spread=0.0), E5M2), fp8_cast(randn(256, inner, seed=1, spread=0.0), E4M3)
    exact = (a.rows_RC.double() * a.inverse_scale) @ (b.rows_RC.double() * b.inverse_scale).t()
    scales = a.inverse_scale, b.inverse_scale
    errors = {
        fast: relative(fp8_product(a.rows_RC, b.rows_RC, scales, dtype=torch.float32, fast_sums=fast), exact)
        for fast in (True, False)
    }
    print(f"\nsums of {inner} terms: relative error {errors[True]:.1e} fast, {errors[False]:.1e} slow")
    assert errors[False] <= 1e-3
    assert errors[True] <= 1e-2 or inner > 5504


def step(precision, *, recompute="none", postponed=False, length=256):
    """(loss, gradients by name, peak bytes of activations)."""
    model = make_model(shape_of(num_key_value_heads=2))
    FlatParameters(model.named_parameters(), dtype=torch.bfloat16, device=torch.device("cuda"))
    tokens = torch.randint(0, 1000, (4, length + 1), generator=torch.Generator().manual_seed(0)).cuda()
    batch = Microbatch.of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    stage = Stage.whole(model, recompute=recompute, precision=precision)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss, saved = stage.forward(None, batch)
    kept = torch.cuda.memory_allocated() - before
    if postponed:
        stage.backward_input(None, saved)[1]()
    else:
        stage.backward(None, saved)
    return loss.total.item(), {name: param.grad for name, param in model.named_parameters()}, kept


@pytest.mark.parametrize(("recompute", "postponed"), [*itertools.product(("none", "selective", "full"), (False, True))])
def test_a_step_equals_the_emulation_within_rounding(recompute, postponed, emulated):
    """The distance of either from the bf16 step is the measure: two steps that differ in a bit soon round apart."""
    plain_loss, plain, _ = step(STORED)
    loss, grads, _ = step(FP8, recompute=recompute, postponed=postponed)
    emulated_loss, expected, _ = emulated(lambda: step(FP8))
    assert loss == pytest.approx(plain_loss, rel=0.01)
    assert loss == pytest.approx(emulated_loss, rel=5e-3)
    for name, grad in grads.items():
        error, allowed = relative(grad, plain[name]), relative(expected[name], plain[name])
        assert error <= 1.6 * allowed, f"{name}: {error:.3f} against {allowed:.3f}"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_fp8_keeps_at_most_the_memory_of_bf16(recompute):
    """For a weight gradient alone one byte instead of two, but what bf16 forms again or has anyway is cast and kept."""
    kept = [step(precision, recompute=recompute, length=512)[2] for precision in (STORED, FP8)]
    assert kept[1] <= (1.15 if recompute == "none" else 1.01) * kept[0]
