"""The kernels on tiles of bf16 (AMX) against fp64: edges of tiles, packed and strided rows, masks, poison, threads."""

import pytest
import torch
from guarded_memory import at_the_end_of_memory

from megacoder.ops import attention as blocked
from megacoder.ops import cpp, tile_attention
from megacoder.ops.attention import (
    DocumentMask,
    attention_backward,
    attention_forward,
    attention_reference,
    causal_mask,
)
from megacoder.ops.linear import accumulate_weight_grad

pytestmark = pytest.mark.skipif(not cpp.has_amx(), reason="this processor does not multiply tiles")

NAN = float("nan")


def randn(*shape, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).bfloat16()


def within_poison(tensor):
    """The same values with NaN on all sides: a kernel that reads beyond its edges shows it."""
    around = tensor.new_full((tensor.numel() + 4096,), NAN)
    around[2048:-2048] = tensor.flatten()
    return around[2048:-2048].view(tensor.shape)


def with_threads(threads, function):
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(kept)


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(0, 3, 2), (1, 1, 1), (31, 17, 5), (33, 40, 48), (257, 64, 200), (2049, 33, 65), (4500, 130, 31)],
)
def test_weight_gradient(tokens, outputs, inputs):
    grad, x = within_poison(randn(tokens, outputs)), within_poison(randn(tokens, inputs))
    before = torch.randn(outputs, inputs)
    expected = before.double() + grad.double().t() @ x.double()
    sums = []
    for threads in (1, 2, 3):
        poisoned = torch.full((outputs + 2, inputs), NAN)
        poisoned[1:-1] = before
        with_threads(threads, lambda total=poisoned[1:-1]: accumulate_weight_grad(total, grad, x))
        assert poisoned[0].isnan().all()
        assert poisoned[-1].isnan().all()
        sums.append(poisoned[1:-1].clone())
    assert error(sums[0], expected) < 2e-6  # the sums are fp32 throughout: bf16 would be 1e-3
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_weight_gradient_of_strided_factors():
    wide, x = randn(70, 3, 48), randn(40, 70)
    total = torch.zeros(48, 40)
    accumulate_weight_grad(total, wide[:, 1], x.t())
    assert error(total, wide[:, 1].double().t() @ x.t().double()) < 2e-6


def fused(batch, heads, groups, length, dim, *, unread=0, scale=1.0):
    """(q, k, v) as views of the rows of a fused projection; `unread` more keys are NaN."""
    rows = within_poison(randn(batch, length + unread, heads + 2 * groups, dim, scale=scale)).transpose(1, 2)
    if unread:
        rows[:, :, length:] = NAN
    return rows.split([heads, groups, groups], dim=1)


def expected_attention(q, k, v, grad_out, mask):
    """(out, lse, gradients of q, k and v), all in fp64."""
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    out = attention_reference(q, k, v, mask=mask)
    (out.transpose(1, 2) * grad_out.double()).sum().backward()
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / q.shape[-1] ** 0.5
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return out.detach().transpose(1, 2), lse.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("start", [0, 77])
@pytest.mark.parametrize(
    ("heads", "groups", "length", "dim"),
    [
        (1, 1, 1, 16),
        (2, 1, 33, 20),
        (4, 2, 48, 48),
        (3, 3, 129, 64),
        (2, 1, 600, 128),
        (1, 1, 1100, 8),
        (2, 2, 70, 240),
        (9, 1, 150, 32),
    ],
)
def test_attention(heads, groups, length, dim, start, packed):
    q, k, v = fused(2, heads, groups, start + length, dim)
    q = q[:, :, start:]
    grad_out = within_poison(randn(2, length, heads, dim))
    first_keys = None
    if packed:
        begins = torch.rand(2, start + length, generator=torch.Generator().manual_seed(0)) < 0.02
        begins[:, 0] = True
        first_keys = torch.where(begins, torch.arange(start + length), 0).cummax(1).values[:, start:]
    mask = causal_mask(torch.arange(start, start + length), start + length, first_keys_BS=first_keys)
    documents = DocumentMask(first_keys, start) if packed else None

    def run():
        out, lse = attention_forward(q, k, v, query_start=start, documents=documents)
        longer_lse = torch.cat([lse, torch.full_like(lse, NAN)], dim=2)  # context parallelism passes halves
        lse = longer_lse[:, :, :length]
        return out, lse, *attention_backward(grad_out, q, k, v, out, lse, query_start=start, documents=documents)

    expected = expected_attention(q, k, v, grad_out, mask)
    results = with_threads(1, run)
    for actual, reference in zip(results, expected, strict=True):
        if reference.norm() > 1e-6:  # with one key, probabilities do not depend on queries and keys
            assert error(actual, reference) < 5e-3
    assert error(results[1], expected[1]) < 1e-6  # scores are fp32
    assert all(torch.equal(a, b) for a, b in zip(results, with_threads(3, run), strict=True))


def test_first_keys_that_are_far_apart_and_in_no_order():
    q, k, v = fused(1, 2, 1, 1400, 32)
    q, start = q[:, :, 700:], 700
    first_keys = torch.randint(0, 701, (1, 700), generator=torch.Generator().manual_seed(0))
    mask = causal_mask(torch.arange(start, 1400), 1400, first_keys_BS=first_keys)
    documents = DocumentMask(first_keys, start)
    grad_out = randn(1, 700, 2, 32)
    out, lse = attention_forward(q, k, v, query_start=start, documents=documents)
    grads = attention_backward(grad_out, q, k, v, out, lse, query_start=start, documents=documents)
    for actual, reference in zip((out, lse, *grads), expected_attention(q, k, v, grad_out, mask), strict=True):
        assert error(actual, reference) < 5e-3


@pytest.mark.parametrize(("heads", "unread"), [(2, 5), (9, 5), (9, 300)])  # with 9, gradients are summed in parts
def test_unread_keys_are_not_read_and_have_no_gradient(heads, unread):
    q, k, v = fused(1, heads, 1, 100, 32, unread=unread)
    q = q[:, :, 40:100]
    first_keys = torch.full((1, 60), 36)
    documents = DocumentMask(first_keys, 40)
    out, lse = attention_forward(q, k, v, query_start=40, documents=documents)
    grads = attention_backward(torch.ones_like(out), q, k, v, out, lse, query_start=40, documents=documents)
    for grad in grads[1:]:
        assert not grad[:, :, :36].any()
        assert not grad[:, :, 100:].any()
        assert torch.isfinite(grad).all()
        assert grad[:, :, 36:100].any()


def test_nothing_beyond_the_end_of_a_tensor_is_touched():
    grad, x, total = (at_the_end_of_memory(t) for t in (randn(37, 50), randn(37, 45), torch.zeros(50, 45)))
    accumulate_weight_grad(total, grad, x)
    assert error(total, grad.double().t() @ x.double()) < 2e-6
    q, k, v, grad_out = (at_the_end_of_memory(randn(1, heads, 37, 20)) for heads in (2, 1, 1, 2))
    out, lse = (at_the_end_of_memory(t) for t in attention_forward(q, k, v))
    grads = attention_backward(grad_out.transpose(1, 2), q, k, v, out, lse)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_huge_scores_are_finite_and_decided_by_the_largest():
    q, k, v = fused(1, 1, 1, 64, 64, scale=300.0)
    out, lse = attention_forward(q, k, v)
    grads = attention_backward(torch.ones_like(out), q, k, v, out, lse)
    reference = attention_reference(q.double(), k.double(), v.double()).transpose(1, 2)
    assert error(out, reference) < 5e-3
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_a_number_that_is_none_stays_one():
    q, k, v = (t.clone() for t in fused(1, 1, 1, 40, 32))
    k[0, 0, 7] = NAN
    out, lse = attention_forward(q, k, v)
    assert torch.isfinite(out[0, :7]).all()
    assert out[0, 7:].isnan().all()
    assert lse[0, 0, 7:].isnan().all()


def test_the_log_sum_exp_of_either_path_serves_the_other(asked):
    """A checkpointed layer may be recomputed where another backend is chosen."""
    q, k, v = fused(1, 2, 1, 90, 32)
    grad_out = randn(1, 90, 2, 32)
    out, lse = attention_forward(q, k, v)
    grads = attention_backward(grad_out, q, k, v, out, lse)
    asked("attention=cpp")
    out, lse = attention_forward(q, k, v)
    asked("attention=amx")
    for grad, expected in zip(attention_backward(grad_out, q, k, v, out, lse), grads, strict=True):
        assert error(grad, expected.double()) < 1e-2


def test_other_dtypes_are_refused():
    q, k, v = fused(1, 1, 1, 8, 16)
    with pytest.raises(ValueError, match=r"needs torch\.bfloat16 on the CPU; got torch\.float32"):
        tile_attention.forward(q, k.float(), v, query_start=0, first_keys_BS=None)


@pytest.mark.parametrize(("heads", "groups", "values"), [(3, 2, 2), (4, 4, 2), (2, 4, 4)])
def test_shapes_that_do_not_fit_are_refused(heads, groups, values):
    q, k, v = randn(1, heads, 8, 16), randn(1, groups, 8, 16), randn(1, values, 8, 16)
    with pytest.raises(ValueError, match="these shapes do not fit"):
        tile_attention.forward(q, k, v, query_start=0, first_keys_BS=None)


def test_a_gradient_of_another_shape_is_refused():
    q, k, v = fused(1, 2, 1, 8, 16)
    out, lse = attention_forward(q, k, v)
    with pytest.raises(ValueError, match="gradient of the output, output and queries have shapes"):
        attention_backward(out[:, :5], q, k, v, out, lse)


def test_masks_are_checked_before_the_kernel_sees_them():
    q, k, v = fused(1, 1, 1, 8, 16)
    documents = DocumentMask(torch.full((1, 8), -5))
    with pytest.raises(ValueError, match="the first key of token 0 of sequence 0 is -5; it must be from 0 to 0"):
        blocked.attention_forward(q, k, v, documents=documents)
