"""Every CUDA launcher against a plain fp64 or torch reference: odd sizes, unaligned starts, nothing at all, poison.

Buffers are views into larger ones, so that a write outside them is noticed. Runs where there is a GPU and the kernels
are built; tests/test_cuda_build.py checks on any machine that they compile, and to what.
"""

import math

import pytest
import torch

from megacoder.core.device import CUDA_LIBRARY
from megacoder.ops.cuda import ADAMW_SCALARS, adamw_cuda_, adamw_scalars, amax, cast_transpose, sum_of_squares_cuda

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="the CUDA kernels are not built here"),
]

DEVICE = torch.device("cuda")
SIZES = [0, 1, 7, 1023, 2**20 + 3]
MARGIN = 32
ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


class Buffer:
    """`count` elements that begin `offset` elements after an aligned address, with a margin on both sides."""

    def __init__(self, count, dtype, offset=0):
        self.bits = torch.full(((count + 2 * MARGIN) * dtype.itemsize,), 0x7F, dtype=torch.uint8, device=DEVICE)
        start = MARGIN + offset
        self.values = self.bits.view(dtype)[start : start + count]
        self.start, self.stop = start * dtype.itemsize, (start + count) * dtype.itemsize

    def assert_margins_untouched(self):
        assert (self.bits[: self.start] == 0x7F).all()
        assert (self.bits[self.stop :] == 0x7F).all()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# AdamW


class Update:
    """The five buffers of an update; in fp32 without `copy` the weight is its own master."""

    def __init__(self, count, weight_dtype=torch.bfloat16, copy=True, offsets=(0, 0, 0, 0, 0)):
        self.buffers = [
            Buffer(count, dtype, offset)
            for dtype, offset in zip([weight_dtype] + [torch.float32] * 4, offsets, strict=True)
        ]
        self.weight, self.master, self.exp_avg, self.exp_avg_sq, self.grad = (b.values for b in self.buffers)
        self.master.copy_(randn(count))
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()
        if not copy:
            self.weight = self.master

    def run(self, scalars, *, weight_decay=0.1):
        adamw_cuda_(
            self.weight, self.master, self.exp_avg, self.exp_avg_sq, self.grad,
            torch.tensor(scalars, dtype=torch.float32, device=DEVICE), weight_decay=weight_decay,
            **ADAMW,
        )  # fmt: skip

    def bits(self):
        return [buffer.bits.clone() for buffer in self.buffers]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(("dtype", "copy"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)])
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (6, 2, 2, 2, 2), (0, 1, 0, 2, 3)])
def test_adamw_follows_fp64_for_100_steps(count, dtype, copy, offsets):
    update = Update(count, dtype, copy, offsets)
    start, exp_avg, exp_avg_sq = (t.double() for t in (update.master, update.exp_avg, update.exp_avg_sq))
    master = start
    grads = [randn(count, seed=seed) for seed in range(7)]
    lr, scale, decay = 2**-7, 0.5, 0.1
    for step in range(1, 101):
        update.grad.copy_(grads[step % 7])
        grad = update.grad.double() * scale
        exp_avg = 0.9 * exp_avg + (1 - 0.9) * grad
        exp_avg_sq = 0.95 * exp_avg_sq + (1 - 0.95) * grad**2
        corrections = 1 - 0.9**step, 1 - 0.95**step
        root = (exp_avg_sq / corrections[1]).sqrt() + 1e-8
        master = master - lr * decay * master - lr / corrections[0] * exp_avg / root
        update.run([lr, scale, *corrections, 0.0], weight_decay=decay)
    # Sums that came close to zero on the way are measured against their terms.
    assert (update.master.double() - master).norm() <= 1e-6 * start.norm()
    assert (update.exp_avg.double() - exp_avg).norm() <= 1e-6 * exp_avg_sq.sqrt().norm()
    assert (update.exp_avg_sq.double() - exp_avg_sq).norm() <= 1e-6 * exp_avg_sq.norm()
    assert torch.equal(update.weight, update.master.to(dtype))
    for buffer in update.buffers:
        buffer.assert_margins_untouched()


def test_adamw_leaves_the_gradient():
    update = Update(1001)
    update.grad.copy_(randn(1001))
    before = update.grad.clone()
    update.run([1e-3, 1.0, 0.1, 0.05, 0.0])
    assert torch.equal(update.grad, before)


@pytest.mark.parametrize("count", [7, 1023])
@pytest.mark.parametrize(("dtype", "copy"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)])
def test_a_skipped_update_leaves_every_byte(count, dtype, copy):
    update = Update(count, dtype, copy)
    update.grad.fill_(math.nan)
    before = update.bits()
    update.run([math.nan, math.nan, 0.0, 0.0, 1.0])
    assert all(same_bits(a, b) for a, b in zip(update.bits(), before, strict=True))


def test_adamw_of_huge_and_tiny_gradients():
    update = Update(6, torch.float32)
    update.master.fill_(1.0)
    update.grad.copy_(torch.tensor([1e18, -1e18, 1e-18, -1e-18, 1e-30, 0.0]))
    update.run([0.5, 1.0, 1 - 0.9, 1 - 0.95, 0.0], weight_decay=0.0)  # the first step moves by lr, whatever the size
    ratios = 0.5 * torch.tensor([1, -1, 1e-18 / (1e-18 + 1e-8), -1e-18 / (1e-18 + 1e-8), 0, 0], dtype=torch.float64)
    assert torch.allclose(update.master.double().cpu(), 1 - ratios, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("squares", "num_tokens", "max_grad_norm"),
    [
        (36.0, 3.0, 10.0),
        (36.0, 3.0, 0.5),
        (0.0, 8.0, 1.0),
        (1e300, 1e6, 1.0),
        (1e-300, 1.0, 1.0),
        (math.inf, 3.0, 1.0),
        (math.nan, 3.0, 1.0),
        (0.0, 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("done", [0, 1, 10_000])
def test_adamw_scalars(squares, num_tokens, max_grad_norm, done):
    scalars, norm = torch.full((ADAMW_SCALARS,), math.nan, device=DEVICE), scalar(math.nan)
    step = scalar(done, torch.int64)
    adamw_scalars(
        scalar(squares), scalar(num_tokens), scalar(3e-4, torch.float32), step, max_grad_norm=max_grad_norm, beta1=0.9,
        beta2=0.95, scalars=scalars, norm=norm,
    )  # fmt: skip
    if not math.isfinite(squares) or num_tokens == 0:
        assert (norm.item(), step.item(), scalars[4].item()) == (math.inf, done, 1.0)
        return
    expected_norm = math.sqrt(squares) / num_tokens
    clip = min(1.0, max_grad_norm / (expected_norm + 1e-6))
    expected = [3e-4, clip / num_tokens, 1 - 0.9 ** (done + 1), 1 - 0.95 ** (done + 1), 0.0]
    assert norm.item() == pytest.approx(expected_norm, rel=1e-15)
    assert step.item() == done + 1
    assert scalars.tolist() == pytest.approx(expected, rel=1.2e-7)


def test_a_captured_update_replays():
    """All that an update reads is on the device: its graph counts the steps, and skips what is not finite."""
    update = Update(1000)
    update.grad.copy_(randn(1000))
    squares, norm, lr = scalar(0.0), scalar(0.0), scalar(1e-2, torch.float32)
    step, scalars = scalar(0, torch.int64), torch.zeros(ADAMW_SCALARS, device=DEVICE)

    def run():
        sum_of_squares_cuda(update.grad, squares)
        adamw_scalars(
            squares, scalar_tokens, lr, step, max_grad_norm=1.0, beta1=0.9, beta2=0.95, scalars=scalars, norm=norm
        )
        adamw_cuda_(
            update.weight, update.master, update.exp_avg, update.exp_avg_sq, update.grad, scalars, weight_decay=0.1,
            **ADAMW,
        )  # fmt: skip

    scalar_tokens = scalar(10.0)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    assert step.item() == 4
    assert scalars[2].item() == pytest.approx(1 - 0.9**4, rel=1e-6)
    update.grad[5] = math.inf
    before = update.bits()
    graph.replay()
    assert (step.item(), norm.item()) == (4, math.inf)
    assert all(same_bits(a, b) for a, b in zip(update.bits(), before, strict=True))


# Sums of squares


@pytest.mark.parametrize("count", [*SIZES, 3 * 2**20 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_sum_of_squares(count, dtype, offset):
    buffer = Buffer(count, dtype, offset)
    buffer.values.copy_(randn(count))
    expected = buffer.values.double().pow(2).sum().item()
    sums = []
    for _ in range(2):
        out = scalar(math.nan)
        sum_of_squares_cuda(buffer.values, out)
        sums.append(out.item())
    assert sums[0] == sums[1]
    assert sums[0] == pytest.approx(expected, rel=1e-13)


def test_every_element_is_counted_once():
    for count in (1, 3, 4, 5, 255, 1024, 1029, 4099):
        buffer = Buffer(count, torch.float32, 3)
        buffer.values.copy_(torch.arange(count))
        out = scalar(math.nan)
        sum_of_squares_cuda(buffer.values, out)
        assert out.item() == sum(i * i for i in range(count))


def test_sums_of_huge_values_are_finite_and_of_bad_ones_are_not():
    values = torch.full((1000,), 1e30, device=DEVICE)
    out = scalar(math.nan)
    sum_of_squares_cuda(values, out)
    assert out.item() == pytest.approx(1e63, rel=1e-6)
    for bad in (math.inf, -math.inf, math.nan):
        values[-1] = bad
        sum_of_squares_cuda(values, out)
        assert not math.isfinite(out.item())


# fp8

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [
    (0, 5), (5, 0), (1, 1), (7, 13), (16, 8), (32, 7), (129, 255), (128, 128), (144, 136), (1023, 64), (2064, 1032),
]  # fmt: skip


def some_bf16(rows, columns):
    """Values around and far beyond the range of fp8, its subnormals and halfway cases among them."""
    count = rows * columns
    values = randn(count) * torch.exp2(randn(count, seed=1) * 6)
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        448.0,
        464.0,
        465.0,
        57344.0,
        61440.0,
        1e30,
        2**-9,
        2**-10,
        2**-16,
    ]
    special = torch.tensor(special, dtype=torch.float64, device=DEVICE)[: count // 2]
    values[: len(special)] = special
    return values[torch.randperm(count, generator=torch.Generator().manual_seed(2)).to(DEVICE)].to(torch.bfloat16)


def cast_reference(x, amax, dtype):
    """(saturating cast of x * scale, inverse scale): torch's own cast may not saturate."""
    amax = scalar(amax, torch.float32).clamp(min=2.0**-100)
    limit = torch.full_like(amax, torch.finfo(dtype).max)
    inverse = amax / limit if amax.isfinite() else torch.full_like(amax, math.nan)
    return (x.float() * (limit / amax)).clamp(-limit, limit).to(dtype), inverse


def assert_same_fp8(actual, expected):
    nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nan)
    assert torch.equal(actual.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("amax", [448.0, 57344.0, 1.7, 0.0, 1e-38, math.inf, math.nan])
def test_cast_transpose(shape, dtype, offset, amax):
    """Whatever the largest magnitude is said to be: what lies above it saturates."""
    rows, columns = shape
    source = Buffer(rows * columns, torch.bfloat16, offset)
    source.values.copy_(some_bf16(rows, columns))
    x = source.values.view(rows, columns)
    out, transposed = Buffer(rows * columns, dtype, offset), Buffer(rows * columns, dtype, 2 * offset)
    inverse_scale = scalar(-1.0, torch.float32)
    cast_transpose(
        x, scalar(amax, torch.float32), out.values.view(rows, columns), transposed.values.view(columns, rows),
        inverse_scale,
    )  # fmt: skip
    expected, expected_inverse = cast_reference(x, amax, dtype)
    assert torch.equal(inverse_scale.view(torch.int32), expected_inverse.view(torch.int32))
    assert_same_fp8(out.values.view(rows, columns), expected)
    assert_same_fp8(transposed.values.view(columns, rows), expected.view(torch.uint8).t().contiguous().view(dtype))
    for buffer in (source, out, transposed):
        buffer.assert_margins_untouched()


def test_cast_transpose_refuses_other_dtypes():
    x = torch.zeros(16, 16, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        cast_transpose(x, scalar(1.0, torch.float32), x.clone(), x.clone(), scalar(1.0, torch.float32))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_amax(count, offset):
    buffer = Buffer(count, torch.bfloat16, offset)
    buffer.values.copy_(randn(count))
    out = scalar(math.nan, torch.float32)
    amax(buffer.values, out)
    assert out.item() == (buffer.values.float().abs().max().item() if count else 0.0)
    for place in {0, count // 2, count - 1} if count else ():
        for special in (-1e30, math.inf, -math.inf):
            buffer.values[place] = special
            amax(buffer.values, out)
            assert out.item() == buffer.values[place].abs().item()
            buffer.values[place] = 0.0
    if count > 1:
        buffer.values[0], buffer.values[-1] = math.inf, -math.nan
        amax(buffer.values, out)
        assert math.isnan(out.item())


# The door


def test_buffers_that_a_kernel_would_misread_are_refused():
    update = Update(8)
    for name, wrong in {
        "exp_avg": torch.zeros(8),
        "exp_avg_sq": torch.zeros(16, device=DEVICE)[::2],
        "grad": torch.zeros(7, device=DEVICE),
        "master": torch.zeros(8, dtype=torch.float64, device=DEVICE),
    }.items():
        right = getattr(update, name)
        setattr(update, name, wrong)
        with pytest.raises(ValueError, match="a kernel needs contiguous"):
            update.run([1e-3, 1.0, 0.1, 0.05, 0.0])
        setattr(update, name, right)
