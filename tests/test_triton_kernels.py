"""Every Triton kernel against fp64: forward, every gradient, odd sizes, outputs poisoned, runs repeated.

On a GPU where there is one, else on the CPU under Triton's interpreter (see conftest). That rounds fp32 to bf16 by
cutting digits off, so there bf16 is allowed twice the error.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

import triton

from megacoder.ops import cross_entropy as cross_entropy_op
from megacoder.ops.rms_norm import rms_norm
from megacoder.ops.rope import apply_rope, rope_tables
from megacoder.ops.rope_scaling import RopeScaling
from megacoder.ops.swiglu import swiglu
from megacoder.ops.triton_kernels import cross_entropy
from megacoder.ops.triton_kernels import qk_norm as qk_norm_kernels
from megacoder.ops.triton_kernels import rms_norm as rms_norm_kernels
from megacoder.ops.triton_kernels.cross_entropy import cross_entropy_, rescale_subtract_, softmax_
from megacoder.ops.triton_kernels.qk_norm import norm_rope_backward, norm_rope_forward
from megacoder.ops.triton_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from megacoder.ops.triton_kernels.rope import gather_unrotate, rope_
from megacoder.ops.triton_kernels.swiglu import swiglu_backward_, swiglu_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
IGNORE_INDEX = cross_entropy_op.IGNORE_INDEX

pytestmark = [
    # numpy, on which the interpreter computes, warns of infinities that a GPU takes in silence
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
        reason="triton 3.6 interprets no loops under numpy 2.4: it makes integers of one-element arrays",
    ),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What a launcher allocates is NaN until a kernel writes it."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poison(empty(*args, **options)))


def randn(*shape, dtype=torch.float64, seed=0, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(DEVICE, dtype)


def assert_near(actual, expected, dtype, *, scale=0.0):
    """Within the tolerance of `dtype`, relative to the norm of what is expected or to `scale` if that is larger."""
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected).norm() / max(float(expected.norm()), float(scale), 1e-30)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def repeated(run):
    """What `run` returns, which must be the same bits twice; it makes its own copies of what it overwrites."""
    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 33), (200, 24), (11, 2048), (2, 5120)])
def test_rms_norm(rows, dim, with_residual, dtype, monkeypatch):
    monkeypatch.setattr(rms_norm_kernels, "multiprocessors", lambda device: 2)  # so that programs walk several tiles
    if INTERPRETED:  # whose time is the number of programs
        monkeypatch.setattr(rms_norm_kernels, "SUM_COLUMNS", 1024)
    x, grad = (randn(rows, dim, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = randn(dim, dtype=dtype, seed=2)
    residual, grad_residual = (randn(rows, dim, dtype=dtype, seed=seed) if with_residual else None for seed in (3, 4))

    def forward_and_backward():
        y, h, rstd = rms_norm_forward(x, weight, 1e-6, residual)
        grad_weight = torch.ones(dim, device=DEVICE)  # gradients are added to what is there
        grad_h = rms_norm_backward(grad, h, weight, rstd, grad_weight_D=grad_weight, grad_residual_TD=grad_residual)
        return y, h, rstd, grad_h, grad_weight

    y, h, rstd, grad_h, grad_weight = repeated(forward_and_backward)
    if residual is None:
        assert h is x
    else:
        assert_near(h, x.double() + residual.double(), dtype)
        assert INTERPRETED or torch.equal(h, x + residual)
        again, same, same_rstd = rms_norm_forward(h, weight, 1e-6)
        assert same is h
        assert torch.equal(again, y)
        assert torch.equal(same_rstd, rstd)

    wide, wide_weight = h.double().requires_grad_(), weight.double().requires_grad_()
    expected = rms_norm(wide, wide_weight, 1e-6)
    expected.backward(grad.double())
    expected_grad = wide.grad if residual is None else wide.grad + grad_residual.double()
    assert_near(y, expected.detach(), dtype)
    assert_near(rstd, wide.detach().pow(2).mean(-1).add(1e-6).rsqrt(), torch.float32)
    # with a single column the gradient is a difference of equal numbers
    assert_near(grad_h, expected_grad, dtype, scale=(grad.double() * weight.double() * rstd.double()[:, None]).norm())
    assert_near(grad_weight, 1 + wide_weight.grad, torch.float32)


def test_rms_norm_of_huge_rows_and_of_none():
    x = randn(2, 33, dtype=torch.float32, scale=1e17)
    weight = randn(33, dtype=torch.float32)
    y, h, rstd = rms_norm_forward(x, weight, 1e-6)
    grad_weight = torch.zeros(33, device=DEVICE)
    grad = rms_norm_backward(y, h, weight, rstd, grad_weight_D=grad_weight)
    wide = x.double().requires_grad_()
    expected = rms_norm(wide, weight.double(), 1e-6)
    expected.backward(y.double())
    assert_near(y, expected.detach(), torch.float32)
    assert_near(grad, wide.grad, torch.float32, scale=(y.double() * weight.double() * rstd.double()[:, None]).norm())

    y, h, rstd = rms_norm_forward(x[:0], weight, 1e-6, x[:0])
    assert (y.shape, h.shape, rstd.shape) == ((0, 33), (0, 33), (0,))
    before = grad_weight.clone()
    assert rms_norm_backward(y, h, weight, rstd, grad_weight_D=grad_weight).shape == (0, 33)
    assert torch.equal(grad_weight, before)


def tables(head_dim):
    """Of a scaled rotation, whose transpose is not its inverse."""
    scaling = RopeScaling(kind="yarn", original_max_position_embeddings=16)
    return tuple(t.to(DEVICE) for t in rope_tables(50, head_dim, theta=10000.0, factor=4.0, scaling=scaling))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "unrotated", "dim"), [(1, 1, 1, 2), (9, 3, 2, 6), (33, 5, 1, 128)])
def test_rope(tokens, heads, unrotated, dim, dtype):
    cos, sin = tables(dim)
    qkv = randn(tokens, (heads + unrotated) * dim, dtype=dtype)
    positions = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wide = qkv[:, : heads * dim].double().unflatten(1, (heads, dim)).requires_grad_()
    expected = apply_rope(wide, cos.double(), sin.double(), positions)
    expected.backward(wide.detach())

    def rotate(inverse):
        rotated = qkv.clone()
        rope_(rotated, cos, sin, positions, num_rotated=heads, head_dim=dim, inverse=inverse)
        return (rotated,)

    for inverse, answer in ((False, expected.detach()), (True, wide.grad)):
        (rotated,) = repeated(lambda inverse=inverse: rotate(inverse))
        assert_near(rotated[:, : heads * dim], answer.flatten(1), dtype)
        assert torch.equal(rotated[:, heads * dim :], qkv[:, heads * dim :])


def test_rope_of_no_tokens():
    cos, sin = tables(6)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    rope_(randn(0, 18, dtype=torch.float32), cos, sin, none, num_rotated=2, head_dim=6)
    grads = [randn(1, heads, 0, 6, dtype=torch.float32) for heads in (2, 1, 1)]
    assert gather_unrotate(*grads, cos, sin, none).shape == (0, 24)


def gradients_of_heads(batch, length, heads, kv_heads, dim, layout, dtype):
    """What attention returns, in one of its memory orders."""
    if layout == "fused":
        fused = randn(batch, length, heads + 2 * kv_heads, dim, dtype=dtype)
        return [grad.transpose(1, 2) for grad in fused.split([heads, kv_heads, kv_heads], dim=2)]
    order = {"heads first": "hhh", "steps first": "sss", "mixed": "shs"}[layout]
    return [
        randn(batch, own, length, dim, dtype=dtype, seed=seed) if first == "h"
        else randn(batch, length, own, dim, dtype=dtype, seed=seed).transpose(1, 2)
        for seed, (own, first) in enumerate(zip((heads, kv_heads, kv_heads), order, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads first", "steps first", "fused", "mixed"])
@pytest.mark.parametrize(("batch", "length", "heads", "kv_heads", "dim"), [(1, 1, 1, 1, 2), (2, 7, 3, 1, 6),
                                                                           (2, 9, 4, 2, 128)])  # fmt: skip
def test_gather_unrotate(batch, length, heads, kv_heads, dim, layout, dtype):
    cos, sin = tables(dim)
    positions = torch.randint(50, (batch * length,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grads = gradients_of_heads(batch, length, heads, kv_heads, dim, layout, dtype)
    wide = torch.zeros(
        batch * length, heads + 2 * kv_heads, dim, dtype=torch.float64, device=DEVICE, requires_grad=True
    )
    q, k, v = wide.split([heads, kv_heads, kv_heads], dim=1)
    outputs = [apply_rope(part, cos.double(), sin.double(), positions) for part in (q, k)] + [v]
    torch.autograd.backward(
        [out.unflatten(0, (batch, length)).transpose(1, 2) for out in outputs], [grad.double() for grad in grads]
    )
    (grad_qkv,) = repeated(lambda: (gather_unrotate(*grads, cos, sin, positions),))
    assert_near(grad_qkv, wide.grad.flatten(1), dtype)
    values = grad_qkv[:, (heads + kv_heads) * dim :].view(batch, length, kv_heads, dim).transpose(1, 2)
    assert torch.equal(values, grads[2])


def normed_and_rotated(qkv, weights, eps, cos, sin, positions, sizes):
    """The reference: (queries and keys, values) of fused rows, in fp64."""
    q, k, v = qkv.unflatten(1, (-1, len(weights[0]))).split(sizes, dim=1)
    normed = torch.cat([rms_norm(part, weight, eps) for part, weight in zip((q, k), weights, strict=True)], dim=1)
    return apply_rope(normed, cos.double(), sin.double(), positions), v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "batch", "length", "heads", "kv_heads", "dim"), [
    ("heads first", 1, 1, 1, 1, 2), ("mixed", 2, 7, 3, 1, 6), ("fused", 2, 9, 4, 2, 128),
    ("steps first", 1, 20, 5, 5, 64),
])  # fmt: skip
def test_norm_and_rope(batch, length, heads, kv_heads, dim, layout, dtype, monkeypatch):
    monkeypatch.setattr(qk_norm_kernels, "BACKWARD_TILE", 256)
    monkeypatch.setattr(qk_norm_kernels, "RESIDENT_WARPS", 2)  # so that programs walk several tiles
    monkeypatch.setattr(qk_norm_kernels, "multiprocessors", lambda device: 2)
    (cos, sin), sizes, tokens = tables(dim), [heads, kv_heads, kv_heads], batch * length
    positions = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    qkv = randn(tokens, sum(sizes) * dim, dtype=dtype, seed=9)
    norms = randn(dim, dtype=dtype, seed=7), randn(dim, dtype=dtype, seed=8), 1e-2
    grads = gradients_of_heads(batch, length, heads, kv_heads, dim, layout, dtype)

    wide, weights = qkv.double().requires_grad_(), [weight.double().requires_grad_() for weight in norms[:2]]
    expected, values = normed_and_rotated(wide, weights, norms[2], cos, sin, positions, sizes)
    wide_grads = [grad.double().transpose(1, 2).flatten(0, 1) for grad in grads]
    torch.autograd.backward([expected, values], [torch.cat(wide_grads[:2], dim=1), wide_grads[2]])

    def forward():
        return (norm_rope_forward(qkv, *norms, cos, sin, positions, num_heads=heads, num_kv_heads=kv_heads),)

    def backward(**more):
        sums = torch.ones(2, dim, device=DEVICE)  # gradients are added to what is there
        grad = norm_rope_backward(
            *grads, qkv, *norms, cos, sin, positions, grad_query_K=sums[0], grad_key_K=sums[1], **more
        )
        return grad, sums

    (qk,), before = repeated(forward), qkv.clone()
    grad, sums = repeated(backward)
    assert torch.equal(qkv, before)
    assert_near(qk, expected.detach().flatten(1), dtype)
    scale = torch.cat(wide_grads, dim=1).norm()  # of two columns a head keeps only the direction across it
    assert_near(grad, wide.grad, dtype, scale=scale)
    assert torch.equal(grad[:, (heads + kv_heads) * dim :], wide_grads[2].flatten(1).to(dtype))
    for ours, weight in zip(sums, weights, strict=True):
        assert_near(ours, 1 + weight.grad, torch.float32)
    amax = torch.zeros((), device=DEVICE)
    assert torch.equal(backward(amax=amax)[0], grad)
    assert amax == amax_of(grad)


@pytest.mark.parametrize("multiprocessors", [1, 78, 108, 114, 132, 144, 160])
@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (40, 8), (32, 8), (16, 16), (12, 2), (7, 1), (2, 1)])
def test_persistent_programs_all_run_at_once(multiprocessors, heads, kv_heads):
    resident = 5 * multiprocessors
    queries, keys = qk_norm_kernels.shares(resident, heads, kv_heads)
    assert queries + keys == resident
    assert abs(queries * kv_heads - keys * heads) < heads + kv_heads, "a program of one kind has more to do"


def test_either_kind_of_head_has_a_program():
    assert qk_norm_kernels.shares(1, 64, 8) == (1, 1)
    assert qk_norm_kernels.shares(2, 64, 8) == (1, 1)


def test_norm_and_rope_of_huge_heads_and_of_none():
    cos, sin = tables(6)
    qkv, ones, positions = randn(5, 24, dtype=torch.float32, scale=1e17), torch.ones(6, device=DEVICE), torch.arange(5)
    positions = positions.to(DEVICE)
    sums = torch.zeros(2, 6, device=DEVICE)
    grads = [randn(1, own, 5, 6, dtype=torch.float32, seed=own) for own in (2, 1, 1)]
    wide = qkv.double().requires_grad_()
    expected, _ = normed_and_rotated(wide, [ones.double()] * 2, 1e-6, cos, sin, positions, [2, 1, 1])
    expected.backward(torch.cat(grads[:2], dim=1)[0].transpose(0, 1).double())
    norms = ones, ones, 1e-6
    qk = norm_rope_forward(qkv, *norms, cos, sin, positions, num_heads=2, num_kv_heads=1)
    assert_near(qk, expected.detach().flatten(1), torch.float32)
    grad = norm_rope_backward(*grads, qkv, *norms, cos, sin, positions, grad_query_K=sums[0], grad_key_K=sums[1])
    assert_near(grad[:, :18] * 1e17, wide.grad[:, :18] * 1e17, torch.float32)

    before, none = sums.clone(), positions[:0]
    assert norm_rope_forward(qkv[:0], *norms, cos, sin, none, num_heads=2, num_kv_heads=1).shape == (0, 18)
    nothing = [grad[:, :, :0] for grad in grads]
    grad = norm_rope_backward(*nothing, qkv[:0], *norms, cos, sin, none, grad_query_K=sums[0], grad_key_K=sums[1])
    assert grad.shape == (0, 24)
    assert torch.equal(sums, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 17), (3, 5504), (33, 512)])
def test_swiglu(rows, dim, dtype):
    gate_up, grad = randn(rows, 2 * dim, dtype=dtype, scale=3), randn(rows, dim, dtype=dtype, seed=1)
    wide = gate_up.double().requires_grad_()
    expected = swiglu(wide)
    expected.backward(grad.double())

    def backward():
        overwritten = gate_up.clone()
        return swiglu_backward_(grad, overwritten), overwritten

    (out,) = repeated(lambda: (swiglu_forward(gate_up),))
    activation, grad_gate_up = repeated(backward)
    assert_near(out, expected.detach(), dtype)
    assert torch.equal(activation, out)
    assert_near(grad_gate_up, wide.grad, dtype)


def test_swiglu_of_huge_gates_and_of_no_rows():
    gate_up = torch.tensor([[1e30, -1e30, 90.0, -90.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    expected = torch.tensor([[1e30, 0.0, 90.0, 0.0]], device=DEVICE)
    assert torch.allclose(swiglu_forward(gate_up), expected, atol=1e-6)
    assert torch.allclose(swiglu_backward_(torch.ones(1, 4, device=DEVICE), gate_up), expected, atol=1e-6)
    expected_grad = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1e30, 0.0, 90.0, 0.0]], device=DEVICE)
    assert torch.allclose(gate_up, expected_grad, atol=1e-6)
    assert swiglu_forward(gate_up[:0]).shape == (0, 4)
    assert swiglu_backward_(gate_up[:0, :4].contiguous(), gate_up[:0]).shape == (0, 4)


def amax_of(*tensors):
    return max(tensor.float().abs().max() for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 2), (37, 34), (5, 2048)])
def test_the_largest_magnitude_comes_with_the_result(rows, dim, dtype, monkeypatch):
    """Of the same bits as without; and it is no number where the input has an infinity or a NaN."""
    monkeypatch.setattr(rms_norm_kernels, "multiprocessors", lambda device: 2)
    if INTERPRETED:
        monkeypatch.setattr(rms_norm_kernels, "SUM_COLUMNS", 1024)
    x, grad, residual = (randn(rows, dim, dtype=dtype, seed=seed, scale=3.0) for seed in range(3))
    weight, gate_up = randn(dim, dtype=dtype, seed=3), randn(rows, 2 * dim, dtype=dtype, seed=4)
    cos, sin = tables(2)
    heads = [randn(1, number, rows, 2, dtype=dtype, seed=number) for number in (dim // 2, 1, 1)]
    positions = torch.arange(rows, device=DEVICE)
    _, h, rstd = rms_norm_forward(x, weight, 1e-6, residual)

    def backward_of_norm(grad, **more):
        grad_weight = torch.zeros(dim, device=DEVICE)
        return rms_norm_backward(grad, h, weight, rstd, grad_weight_D=grad_weight, grad_residual_TD=residual, **more)

    def backward_of_swiglu(grad, **more):
        overwritten = gate_up.clone()
        swiglu_backward_(grad, overwritten, **more)
        return overwritten

    runs = {
        "norm": (lambda x, **more: rms_norm_forward(x, weight, 1e-6, residual, **more)[0], x),
        "norm backward": (backward_of_norm, grad),
        "swiglu": (lambda gate_up, **more: swiglu_forward(gate_up, **more), gate_up),
        "swiglu backward": (backward_of_swiglu, grad),
        "gather": (lambda v, **more: gather_unrotate(heads[0], heads[1], v, cos, sin, positions, **more), heads[2]),
    }
    for name, (run, varied) in runs.items():
        plain, amax = run(varied), torch.zeros((), device=DEVICE)
        assert torch.equal(run(varied, amax=amax), plain), name
        assert amax == amax_of(plain), name
        higher = amax_of(plain) + 1
        run(varied, amax=higher)
        assert higher == amax_of(plain) + 1, name  # raised, never lowered
        for bad in (torch.inf, torch.nan):
            spoilt = varied.clone()
            spoilt.view(-1)[-1] = bad
            run(spoilt, amax=amax)
            assert not amax.isfinite(), name
            amax.zero_()


def test_the_activation_is_recomputed_only_on_request():
    gate_up, grad = randn(5, 34, dtype=torch.bfloat16), randn(5, 17, dtype=torch.bfloat16, seed=1)
    overwritten, other = gate_up.clone(), gate_up.clone()
    assert swiglu_backward_(grad, overwritten, forms_activation=False) is None
    swiglu_backward_(grad, other)
    assert torch.equal(overwritten, other)


LOGITS = [(1, 1, 1), (7, 8, 3), (5, 100, 100), (5, 128, 37), (3, 20_001, 19_997), (3, 32_256, 32_022)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocab"), LOGITS)
def test_cross_entropy(rows, width, vocab, dtype):
    logits = randn(rows, width, dtype=dtype, scale=3.0)
    logits[:, vocab:] = torch.nan  # padding must not be looked at
    labels = (torch.arange(rows, device=DEVICE) * 7919 + vocab - 1) % vocab
    labels[1::3] = IGNORE_INDEX
    wide = logits[:, :vocab].double().requires_grad_()
    expected = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="none")
    expected.sum().backward()
    logits[1::3] = torch.nan  # nor rows that are not trained on

    def loss_and_grad():
        overwritten = logits.clone()
        return cross_entropy_(overwritten, labels, vocab=vocab), overwritten

    loss, grad = repeated(loss_and_grad)
    assert_near(loss, expected.detach(), torch.float32, scale=1.0)
    assert_near(grad[:, :vocab], wide.grad, dtype, scale=1e-6)
    assert not grad[:, vocab:].any()
    assert not grad[1::3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocab"), [*LOGITS, (3, 100, 0), (0, 100, 7)])
def test_softmax(rows, width, vocab, dtype):
    logits = randn(rows, width, dtype=dtype, scale=3.0)
    wide = logits[:, :vocab].double()
    logits[:, vocab:] = torch.nan

    def lse_and_softmax():
        overwritten = logits.clone()
        return softmax_(overwritten, vocab=vocab), overwritten

    lse, probs = repeated(lse_and_softmax)
    assert torch.allclose(lse.double(), wide.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert_near(probs[:, :vocab], wide.softmax(-1), dtype)
    assert not probs[:, vocab:].any()


def test_cross_entropy_of_huge_logits_and_of_nothing():
    for dtype in DTYPES:
        logits = torch.full((2, 9), 1e30, dtype=dtype, device=DEVICE)
        loss = cross_entropy_(logits, torch.tensor([1, 2], device=DEVICE), vocab=4)
        assert torch.allclose(loss, torch.full_like(loss, 4.0).log())
        assert torch.equal(logits[0], torch.tensor([0.25, -0.75, 0.25, 0.25] + [0.0] * 5, device=DEVICE).to(dtype))
        ignored = torch.full((2,), IGNORE_INDEX, device=DEVICE)
        loss = cross_entropy_(logits, ignored, vocab=4)
        assert not loss.any()
        assert not logits.any()
    assert cross_entropy_(logits[:0], ignored[:0], vocab=4).shape == (0,)


def test_softmax_after_a_block_of_minus_infinity():
    logits = randn(2, cross_entropy.TILE + 5, dtype=torch.float32)
    logits[:, : cross_entropy.TILE] = -torch.inf
    expected = logits.double()
    lse = softmax_(logits, vocab=logits.shape[1])
    assert_near(lse, expected.logsumexp(-1), torch.float32, scale=1.0)
    assert_near(logits, expected.softmax(-1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "id_counts"), [(8, [8, 5]), (9000, [9000, 8321]), (16, [16, 16, 3, 0])])
def test_vocabulary_in_shards(width, id_counts, dtype):
    """Each shard's softmax, rescaled by what all shards know, is its part of the whole gradient."""
    rows, vocab = 5, sum(id_counts)
    whole = randn(rows, vocab, dtype=dtype, scale=3.0)
    labels = (torch.arange(rows, device=DEVICE) * 3 + vocab - 2) % vocab
    labels[2] = IGNORE_INDEX
    wide = whole.double().requires_grad_()
    F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum").backward()

    def sharded_grad():
        shards = [F.pad(part, (0, width - part.shape[1]), value=torch.nan) for part in whole.split(id_counts, dim=1)]
        lses = [softmax_(shard, vocab=count) for shard, count in zip(shards, id_counts, strict=True)]
        lse = torch.stack(lses).logsumexp(0)
        for first, (shard, own_lse, count) in enumerate(zip(shards, lses, id_counts, strict=True)):
            local = labels - sum(id_counts[:first])
            owned = (local >= 0) & (local < count)
            scale = torch.exp(own_lse - lse) * (labels != IGNORE_INDEX)
            rescale_subtract_(shard, scale, local.masked_fill(~owned, 0), owned)
        return shards

    shards = repeated(sharded_grad)
    for shard, expected, count in zip(shards, wide.grad.split(id_counts, dim=1), id_counts, strict=True):
        assert torch.isfinite(shard).all()
        assert_near(shard[:, :count], expected, dtype, scale=2 * wide.grad.norm())  # probabilities are rounded twice
        assert not shard[:, count:].any()


def test_ignored_labels_are_those_of_the_op():
    assert cross_entropy.IGNORE_INDEX.value == IGNORE_INDEX


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: swiglu_forward(x.half()), "must be stored as bfloat16 or float32, not torch.float16"),
        (lambda x: swiglu_forward(x, amax=x[0]), r"amax must be contiguous torch.float32 \[\]; got .* \[8\]"),
        (lambda x: swiglu_forward(x[:, ::2]), r"contiguous torch.float32 \[4, 4\]; got .* with strides \[8, 2\]"),
        (lambda x: swiglu_forward(x[:, :7].contiguous()), "7 columns do not split"),
        (lambda x: swiglu_backward_(x, x), r"grad_TF must be .* \[4, 4\]; got torch.float32 \[4, 8\]"),
        (lambda x: rms_norm_forward(x, x[0].bfloat16(), 1e-6), "weight_D must be .*; got torch.bfloat16"),
        (lambda x: rms_norm_forward(x, x[0], 1e-6, x[:2]), r"residual_TD must be .* \[4, 8\]; got .* \[2, 8\]"),
        (lambda x: rms_norm_forward(x.new_zeros(1, 16_385), x.new_zeros(16_385), 1e-6), "a row of 16385 elements"),
        (
            lambda x: rms_norm_backward(x, x, x[0], x[:, 0].contiguous(), grad_weight_D=x[0].bfloat16()),
            "grad_weight_D must be contiguous torch.float32",
        ),
        (lambda x: cross_entropy_(x, torch.zeros(4, dtype=torch.int32), vocab=8), "labels_C must be .* torch.int64"),
        (lambda x: softmax_(x, vocab=9), "vocabulary of 9 ids does not fit in rows of 8 columns"),
        (lambda x: rescale_subtract_(x, x[:, 0], x[:, 0], x[:, 0]), "scale_C must be .* with strides \\[8\\]"),
        (
            lambda x: rope_(x, *rope_tables(4, 4, theta=1e4), torch.arange(4), num_rotated=3, head_dim=4),
            "3 heads of 4 do not fit in rows of 8 columns",
        ),
        (
            lambda x: rope_(x, *rope_tables(4, 4, theta=1e4), torch.arange(3), num_rotated=2, head_dim=4),
            r"positions_T must be contiguous torch.int64 \[4\]; got torch.int64 \[3\]",
        ),
        (
            lambda x: rope_(x, *rope_tables(4, 8, theta=1e4), torch.arange(4), num_rotated=2, head_dim=4),
            r"cos_PK2 must be contiguous torch.float32 \[4, 2\]; got torch.float32 \[4, 4\]",
        ),
        (
            lambda x: norm_rope_forward(
                x, x[0, :4], x[0, :4], 1e-6, *rope_tables(4, 4, theta=1e4), torch.arange(4), num_heads=2, num_kv_heads=1
            ),
            r"qkv_TC must be .* \[4, 16\]; got .* \[4, 8\]",
        ),
        (
            lambda x: norm_rope_forward(
                x, x[0, :2], x[0], 1e-6, *rope_tables(4, 2, theta=1e4), torch.arange(4), num_heads=2, num_kv_heads=1
            ),
            r"key_K must be .* \[2\]; got .* \[8\]",
        ),
        (
            lambda x: gather_unrotate(
                *[x.view(1, 2, 4, 4).mT] * 3, *rope_tables(4, 4, theta=1e4), torch.arange(4)
            ),
            "grad_q_BHSK must be .* with contiguous heads; got .* with strides",
        ),
    ],
)  # fmt: skip
def test_the_assumptions_of_kernels_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 8))
