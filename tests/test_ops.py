"""Every op's halves against its plain reference in fp64: forward, every gradient, odd sizes, both backends."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from guarded_memory import at_the_end_of_memory

from megacoder.ops import linear
from megacoder.ops.adamw import AdamWConfig, adamw_, sum_of_squares
from megacoder.ops.attention import (
    DocumentMask,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    causal_mask,
)
from megacoder.ops.cross_entropy import (
    CHUNK_ELEMENTS,
    IGNORE_INDEX,
    linear_cross_entropy,
    linear_cross_entropy_with_grads,
    softmax_,
)
from megacoder.ops.few_rows import FEW, few_rows_linear
from megacoder.ops.linear import accumulate_bias_grad, accumulate_weight_grad
from megacoder.ops.qk_norm import HeadNorms, norm_rope_backward, norm_rope_forward
from megacoder.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward
from megacoder.ops.rope import apply_rope, apply_rope_, rope_tables
from megacoder.ops.rope_scaling import RopeScaling
from megacoder.ops.split_master import join_master, split_master_
from megacoder.ops.swiglu import swiglu, swiglu_backward_, swiglu_forward

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def randn(*shape, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * scale).to(DEVICE, dtype)


def assert_near(actual, expected, dtype, factor=1.0):
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= factor * TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 7), (65, 192), (200, 33)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows, dim, dtype, with_residual):
    x, weight, grad = (
        randn(rows, dim, dtype=dtype),
        randn(dim, dtype=dtype, seed=1),
        randn(rows, dim, dtype=dtype, seed=2),
    )
    residual = randn(rows, dim, dtype=dtype, seed=3) if with_residual else None
    summed = x if residual is None else x + residual

    wide, wide_weight = summed.double().requires_grad_(), weight.double().requires_grad_()
    expected = rms_norm(wide, wide_weight, 1e-6)
    expected.backward(grad.double())

    y, h, rstd = rms_norm_forward(x, weight, 1e-6, residual_TD=residual)
    grad_weight = torch.ones(dim)  # gradients are added to what is there
    grad_h = rms_norm_backward(grad, h, weight, rstd, grad_weight_D=grad_weight, grad_residual_TD=residual)
    assert torch.equal(h, summed)
    assert_near(y, expected.detach(), dtype)
    expected_grad = wide.grad if residual is None else wide.grad + residual.double()
    assert (grad_h.double() - expected_grad).norm() <= TOLERANCE[dtype] * grad.double().norm() * rstd.max() * 4
    assert_near(grad_weight, 1 + wide_weight.grad, torch.float32, factor=2)


def test_rms_norm_of_rows_as_small_as_epsilon():
    """A row of zeros, and rows whose mean square is about the epsilon that is added to it."""
    x, weight, grad = randn(4, 96, dtype=torch.float32, scale=1e-3), torch.ones(96), randn(4, 96, dtype=torch.float32)
    x[0] = 0.0
    wide = x.double().requires_grad_()
    expected = rms_norm(wide, weight.double(), 1e-6)
    expected.backward(grad.double())
    y, h, rstd = rms_norm_forward(x, weight, 1e-6)
    assert_near(y, expected.detach(), torch.float32)
    assert torch.allclose(y[1:].double().pow(2).mean(-1), 1 / (1 + 1e-6 / x[1:].double().pow(2).mean(-1)))
    assert_near(rms_norm_backward(grad, h, weight, rstd, grad_weight_D=torch.zeros(96)), wide.grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_rotates_in_place_and_back(dtype):
    cos, sin = rope_tables(50, 6, theta=10000.0, factor=4.0)
    qkv, positions = randn(9, 5 * 6, dtype=dtype), torch.tensor([0, 1, 2, 49, 4, 0, 1, 30, 7])
    expected = apply_rope(qkv.double()[:, :18].unflatten(1, (3, 6)), cos.double(), sin.double(), positions).flatten(1)
    rotated = qkv.clone()
    apply_rope_(rotated, cos, sin, positions, num_rotated=3, head_dim=6)
    assert_near(rotated[:, :18], expected, dtype)
    assert torch.equal(rotated[:, 18:], qkv[:, 18:])
    apply_rope_(rotated, cos, sin, positions, num_rotated=3, head_dim=6, inverse=True)
    assert_near(rotated, qkv.double(), dtype)


def test_a_rotation_in_bf16_rounds_its_result_alone():
    x, table, positions = randn(9, 3, 16, dtype=torch.bfloat16), rope_tables(40, 16, theta=10000.0), torch.arange(9) * 4
    unrounded = apply_rope(x.float(), *table, positions)
    assert torch.equal(apply_rope(x, *table, positions), unrounded.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "heads", "kv_heads", "dim"), [(1, 1, 1, 1, 2), (2, 5, 3, 1, 6),
                                                                           (2, 70, 4, 2, 64)])  # fmt: skip
def test_norm_and_rotation_of_heads(batch, length, heads, kv_heads, dim, dtype):
    """By a scaled rotation, whose transpose is not its inverse."""
    yarn = RopeScaling(kind="yarn", original_max_position_embeddings=16)
    cos, sin = rope_tables(90, dim, theta=10000.0, factor=4.0, scaling=yarn)
    tokens, sizes = batch * length, [heads, kv_heads, kv_heads]
    positions = torch.randperm(90, device="cpu").repeat(2)[:tokens].to(DEVICE)
    qkv = randn(tokens, sum(sizes) * dim, dtype=dtype)
    norms = HeadNorms(randn(dim, dtype=dtype, seed=1), randn(dim, dtype=dtype, seed=2), 1e-2)
    grads = [randn(batch, own, length, dim, dtype=dtype, seed=3 + at) for at, own in enumerate(sizes)]
    grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)

    wide, weights = qkv.double().requires_grad_(), [weight.double().requires_grad_() for weight in norms[:2]]
    q, k, v = wide.unflatten(1, (-1, dim)).split(sizes, dim=1)
    normed = [rms_norm(part, weight, norms.eps) for part, weight in zip((q, k), weights, strict=True)]
    expected = [apply_rope(part, cos.double(), sin.double(), positions) for part in normed] + [v]
    torch.autograd.backward(
        [part.unflatten(0, (batch, length)).transpose(1, 2) for part in expected], [grad.double() for grad in grads]
    )
    before = qkv.clone()
    qk = norm_rope_forward(qkv, norms, cos, sin, positions, num_heads=heads, num_kv_heads=kv_heads)
    assert_near(qk, torch.cat(expected[:2], dim=1).detach().flatten(1), dtype)
    grad_weights, amax = [torch.ones(dim), torch.ones(dim)], torch.zeros(())
    grad = norm_rope_backward(
        *grads, qkv, norms, cos, sin, positions, grad_query_K=grad_weights[0], grad_key_K=grad_weights[1], amax=amax
    )
    assert_near(grad, wide.grad, dtype)
    assert amax == grad.abs().max()
    for ours, weight in zip(grad_weights, weights, strict=True):  # added to what is there
        assert_near(ours, 1 + weight.grad, dtype)
    assert torch.equal(qkv, before)


def test_norm_and_rotation_of_no_tokens():
    norms, (cos, sin) = HeadNorms(torch.ones(4), torch.ones(4), 1e-6), rope_tables(3, 4, theta=1e4)
    none = torch.zeros(0, dtype=torch.int64)
    assert norm_rope_forward(torch.zeros(0, 16), norms, cos, sin, none, num_heads=2, num_kv_heads=1).shape == (0, 12)
    grads, sums = [torch.zeros(1, own, 0, 4) for own in (2, 1, 1)], torch.ones(2, 4)
    assert norm_rope_backward(
        *grads, torch.zeros(0, 16), norms, cos, sin, none, grad_query_K=sums[0], grad_key_K=sums[1]
    ).shape == (0, 16)
    assert torch.equal(sums, torch.ones(2, 4))


def test_angles_of_late_positions_keep_their_phase():
    """In fp32 angles of the last of 16K positions would be off by up to 0.0002."""
    length, theta, factor = 16384, 100_000.0, 4.0
    cos, sin = rope_tables(length, 128, theta=theta, factor=factor)
    for position, pair in itertools.product((1, 8191, length - 1), (0, 1, 7, 63)):
        angle = position / factor * theta ** (-2 * pair / 128)
        assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_linear_scaling_divides_positions():
    plain, _ = rope_tables(4, 8, theta=100000.0)
    scaled, _ = rope_tables(16, 8, theta=100000.0, factor=4.0)
    assert torch.equal(scaled[::4], plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 17), (33, 512)])
def test_swiglu(rows, dim, dtype):
    gate_up, grad = randn(rows, 2 * dim, dtype=dtype, scale=3), randn(rows, dim, dtype=dtype, seed=1)
    wide = gate_up.double().requires_grad_()
    expected = swiglu(wide)
    expected.backward(grad.double())
    assert_near(swiglu_forward(gate_up), expected.detach(), dtype)
    overwritten = gate_up.clone()
    assert_near(swiglu_backward_(grad, overwritten), expected.detach(), dtype)
    assert_near(overwritten, wide.grad, dtype)


def test_swiglu_of_huge_gates_is_finite():
    gate_up = torch.tensor([[1e30, -1e30, 90.0, -90.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(swiglu_forward(gate_up), torch.tensor([[1e30, 0.0, 90.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(2, 2, 5), (4, 2, 70), (3, 1, 300), (2, 2, 1)])
def test_attention(heads, kv_heads, length, dtype):
    q, k, v = (randn(2, n, length, 16, dtype=dtype, seed=s) for s, n in enumerate((heads, kv_heads, kv_heads)))
    grad = randn(2, length, heads, 16, dtype=dtype, seed=5)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected = attention_reference(*wide)
    expected.backward(grad.double().transpose(1, 2))

    out, lse = attention_forward(q, k, v)
    assert_near(out.transpose(1, 2), expected.detach(), dtype)
    for actual, reference in zip(attention_backward(grad, q, k, v, out, lse), wide, strict=True):
        scale = max(reference.grad.norm(), 0.1 * grad.double().norm())  # q's and k's gradients vanish at length 1
        assert (actual.double() - reference.grad).norm() <= 3 * TOLERANCE[dtype] * scale
    assert_near(attention(q, k, v, mask=None), expected.detach(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_small_probabilities_count(dtype):
    """Each of them is 2e-6 of the first key's, all together 0.25%."""
    q, k, v = torch.zeros(3, 1, 1, 1100, 16, dtype=dtype)
    q[..., 0], k[:, :, 0, 0], v[:, :, 1:] = 4.0, 13.0, 64.0
    out, lse = attention_forward(q, k, v)
    others = torch.arange(1100, dtype=torch.float64)
    assert lse[0, 0].double().cpu().numpy() == pytest.approx((math.exp(13) + others).log().cpu().numpy(), abs=2e-4)
    assert out[0, -1, 0].double().cpu().numpy() == pytest.approx(64 * 1099 / (math.exp(13) + 1099), rel=1e-2)


def first_keys_of(starts, *, query_start, length):
    """(B, S) first keys of queries `query_start`..., from the starts of each sequence's documents."""
    places = torch.arange(query_start, query_start + length)
    return torch.stack(
        [(torch.tensor(own)[torch.searchsorted(torch.tensor(own), places, right=True) - 1]) for own in starts]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("query_start", "length", "unread", "starts"),
    [
        (64, 70, 0, None),
        (5, 1, 2, None),
        (0, 130, 3, None),
        (0, 300, 0, [[0, 64, 128, 256], [0, 1, 63, 65, 299]]),  # on and off the edges of blocks, and one token alone
        (100, 90, 7, [[0, 100, 164], [0, 30, 150]]),  # documents that begin before, at and after the first query
        (256, 270, 0, [[0, 512], [0, 255, 257]]),
        (0, 1, 0, [[0], [0]]),
    ],
)
def test_attention_of_part_of_a_sequence_and_within_documents(
    query_start, length, unread, starts, heads, kv_heads, dtype, monkeypatch
):
    monkeypatch.setattr("megacoder.ops.attention.BLOCK_ELEMENTS", 64 * 300)  # some blocks of one head, some of several
    num_keys = query_start + length + unread
    q, grad = randn(2, heads, length, 16, dtype=dtype), randn(2, length, heads, 16, dtype=dtype, seed=5)
    k, v = (randn(2, kv_heads, num_keys, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    first_keys = None if starts is None else first_keys_of(starts, query_start=query_start, length=length)
    mask = causal_mask(torch.arange(query_start, query_start + length), num_keys, first_keys_BS=first_keys)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected = attention_reference(*wide, mask=mask)
    expected.backward(grad.double().transpose(1, 2))
    k[:, :, query_start + length :], v[:, :, query_start + length :] = torch.nan, torch.nan  # must not be read

    masks = {"query_start": query_start}
    if first_keys is not None:
        masks["documents"] = DocumentMask(first_keys, query_start)
    out, lse = attention_forward(q, k, v, **masks)
    assert_near(out.transpose(1, 2), expected.detach(), dtype)
    grads = attention_backward(grad, q, k, v, out, lse, **masks)
    for actual, reference in zip(grads, wide, strict=True):
        scale = max(reference.grad.norm(), 0.2 * grad.double().norm())
        assert (actual.double() - reference.grad).norm() <= 3 * TOLERANCE[dtype] * scale
    unread_grads = [t[:, :, query_start + length :] for t in grads[1:]]
    assert not any(t.any() for t in unread_grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_equal_each_alone(dtype):
    """The masked half of a packed sequence equals the unmasked one of every document."""
    q, k, v = (randn(1, 2, 400, 16, dtype=dtype, seed=seed) for seed in range(3))
    starts = [0, 1, 130, 256, 400]
    first_keys = first_keys_of([starts], query_start=0, length=400)
    packed, _ = attention_forward(q, k, v, documents=DocumentMask(first_keys))
    for first, last in itertools.pairwise(starts):
        alone, _ = attention_forward(*(t[:, :, first:last] for t in (q, k, v)))
        assert_near(packed[:, first:last], alone.double(), dtype)
    mask = causal_mask(torch.arange(400), 400, first_keys_BS=first_keys)
    assert_near(attention(q, k, v, mask=mask).transpose(1, 2), packed.double(), dtype)


@pytest.mark.parametrize(
    ("first_keys", "message"),
    [
        ([[0, 0, 4]], "the first key of token 3 of sequence 0 is 4; it must be from 0 to 3"),
        ([[0, -1, 0]], "the first key of token 2 of sequence 0 is -1"),
        ([[0, 0]], r"first keys of 1 x 3 queries have shape \[1, 2\]"),
    ],
)
def test_masks_that_leave_a_query_nothing_are_refused(first_keys, message):
    q = randn(1, 1, 3, 8, dtype=torch.float32)
    k = randn(1, 1, 4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        attention_forward(q, k, k, query_start=1, documents=DocumentMask(torch.tensor(first_keys), 1))


def test_too_few_keys_are_refused():
    q = randn(1, 1, 3, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="3 keys for queries up to token 3"):
        attention_forward(q, q, q, query_start=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 37, 128])
def test_linear_cross_entropy(vocab, dtype, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, DEVICE, 128 * 7)  # several chunks, the last one ragged
    x, weight = randn(23, 12, dtype=dtype), randn(128, 12, dtype=dtype, seed=1)
    labels = torch.arange(23) % vocab
    labels[::5] = IGNORE_INDEX
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = linear_cross_entropy(wide, wide_weight, labels, vocab=vocab)
    expected.backward()

    grad_weight = torch.zeros(128, 12)
    loss, grad_x = linear_cross_entropy_with_grads(x, weight, labels, vocab=vocab, grad_weight_WD=grad_weight)
    assert loss.num_tokens == int((labels != IGNORE_INDEX).sum())
    assert loss.total.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype], abs=1e-5)
    assert (grad_x.double() - wide.grad).norm() <= 3 * TOLERANCE[dtype] * max(wide.grad.norm(), 1e-3)
    assert (grad_weight.double() - wide_weight.grad).norm() <= 3 * TOLERANCE[dtype] * max(wide_weight.grad.norm(), 1e-3)
    assert not grad_weight[vocab:].any(), "padding must receive no gradient"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [4096, 8200])
def test_the_terms_of_a_large_vocabulary_are_summed_once(vocab, dtype):
    """Kernels add up such a sum in blocks of a few thousand terms."""
    x, weight, labels = torch.eye(2, dtype=dtype), randn(8203, 2, dtype=dtype), torch.tensor([5, vocab - 1])
    expected = linear_cross_entropy(x.double(), weight.double(), labels, vocab=vocab)
    loss, grad_x = linear_cross_entropy_with_grads(x, weight, labels, vocab=vocab, grad_weight_WD=torch.zeros(8203, 2))
    assert loss.total.item() == pytest.approx(expected.item(), rel=2e-6)
    probabilities = weight[:vocab].double().t().softmax(-1)
    assert_near(grad_x, probabilities @ weight[:vocab].double() - weight[labels].double(), dtype, factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [0, 1, 37, 128])
def test_softmax_in_place(vocab, dtype):
    logits = randn(23, 128, dtype=dtype, scale=3.0)
    wide = logits[:, :vocab].double()
    lse = softmax_(logits, vocab=vocab)
    assert torch.allclose(lse.double(), wide.logsumexp(-1), atol=1e-5)
    assert torch.allclose(logits[:, :vocab].double(), wide.softmax(-1), atol=TOLERANCE[dtype])
    assert not logits[:, vocab:].any()


def test_cross_entropy_of_huge_logits_and_of_nothing():
    x, weight = torch.full((2, 4), 1e3), torch.eye(4) * 1e3
    loss, grad = linear_cross_entropy_with_grads(
        x, weight, torch.tensor([1, 2]), vocab=4, grad_weight_WD=torch.zeros(4, 4)
    )
    assert loss.total.item() == pytest.approx(2 * torch.log(torch.tensor(4.0)).item(), rel=1e-6)
    assert torch.isfinite(grad).all()
    ignored = torch.full((2,), IGNORE_INDEX)
    loss, grad = linear_cross_entropy_with_grads(x, weight, ignored, vocab=4, grad_weight_WD=torch.zeros(4, 4))
    assert (loss.total.item(), loss.num_tokens) == (0.0, 0)
    assert not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_gradient_is_the_same_in_parts(dtype, monkeypatch):
    """As of an output head, whose product in bf16 would be too large; here 4, 4 and 2 rows at a time."""
    monkeypatch.setattr(linear, "PARTIAL_ELEMENTS", 4 * 24)
    grad, x, total = randn(33, 10, dtype=dtype), randn(33, 24, dtype=dtype, seed=1), randn(10, 24, seed=2).float()
    expected = total.double() + grad.double().t() @ x.double()
    accumulate_weight_grad(total, grad, x)
    assert_near(total, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_gradient_is_summed_in_fp32(dtype):
    """Over more tokens than are widened at a time, to which one far larger number is added first."""
    grad, total = randn(2 * linear.WIDENED_TOKENS + 33, 10, dtype=dtype), torch.full((10,), 1000.0, device=DEVICE)
    expected = total.double() + grad.double().sum(0)
    accumulate_bias_grad(total, grad)
    assert (total - expected).abs().max() < 1e-3


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(IndexError, match=f"label {label} is outside the vocabulary of 4 ids"):
        linear_cross_entropy_with_grads(
            torch.ones(1, 2), torch.ones(8, 2), torch.tensor([label]), vocab=4, grad_weight_WD=torch.zeros(8, 2)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_follows_torch_for_100_steps(dtype):
    start = randn(1001).float()
    reference = torch.nn.Parameter(start.double())
    peer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    weight, master = start.to(dtype), start.clone()
    exp_avg, exp_avg_sq = torch.zeros(1001), torch.zeros(1001)
    for step in range(1, 101):
        grad = randn(1001, seed=step).float()
        reference.grad = grad.double() * 0.5
        peer.step()
        adamw_(
            weight, master, exp_avg, exp_avg_sq, grad,
            config=AdamWConfig(), lr=1e-2, step=step, grad_scale=0.5, decayed=True,
        )  # fmt: skip
    assert_near(master, reference.detach(), torch.float32)
    assert torch.equal(weight, master.to(dtype))


@pytest.mark.parametrize("config", [AdamWConfig(beta1=0.9999, beta2=0.99999), AdamWConfig(weight_decay=1e-3)])
def test_adamw_rounds_no_factor_before_it_is_subtracted_from_one(config):
    """1 - beta2 of a rounded beta2 = 0.99999 is 1.4e-3 off; a rounded 1 - lr * decay is off alike in every step."""
    state = [torch.ones(64), torch.ones(64), torch.zeros(64), torch.zeros(64)]
    master, exp_avg, exp_avg_sq = 1.0, 0.0, 0.0
    for step in range(1, 101):
        adamw_(*state, torch.full((64,), 0.5), config=config, lr=1e-3, step=step, grad_scale=1.0, decayed=True)
        exp_avg += (1 - config.beta1) * (0.5 - exp_avg)
        exp_avg_sq += (1 - config.beta2) * (0.25 - exp_avg_sq)
        corrected = (exp_avg_sq / (1 - config.beta2**step)) ** 0.5 + config.eps
        master -= 1e-3 * (config.weight_decay * master + exp_avg / (1 - config.beta1**step) / corrected)
    assert state[2].double().numpy() == pytest.approx(exp_avg, rel=1e-5)
    assert state[3].double().numpy() == pytest.approx(exp_avg_sq, rel=1e-5)
    assert 1 - state[1].double().numpy() == pytest.approx(1 - master, rel=3e-5)


def test_adamw_of_gradients_as_small_as_epsilon():
    """It is added to the root of the second moment after this one's correction for the first steps."""
    config, grad = AdamWConfig(eps=1e-6, weight_decay=0.0), torch.full((64,), 1e-6)
    state = [torch.zeros(64) for _ in range(4)]
    for step in (1, 2, 3):
        adamw_(*state, grad, config=config, lr=1.0, step=step, grad_scale=1.0, decayed=True)
        assert state[1].double().numpy() == pytest.approx(-step / 2, rel=1e-5)


def test_the_bf16_weight_of_a_number_that_is_none_is_none():
    """Also where rounding its bits would carry into the sign, or round them away."""
    master = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    weight = torch.zeros(4, dtype=torch.bfloat16)
    state = [torch.zeros(4) for _ in range(3)]
    adamw_(weight, master, *state, config=AdamWConfig(), lr=1e-3, step=1, grad_scale=1.0, decayed=True)
    assert weight.isnan().all()


def test_split_master_weights_round_to_the_weights_and_lose_one_bit_at_most():
    bits = torch.cat([torch.arange(-0x18000, 0x18000) + (sign << 16) for sign in (0x3F80, -0x4080, 0x0001, 0x7F7E)])
    master = bits.to(torch.int32).view(torch.float32)
    weight, low = torch.empty(len(master), dtype=torch.bfloat16), torch.empty(len(master), dtype=torch.int16)
    split_master_(master, weight, low)
    joined = join_master(weight, low)
    finite = master.isfinite()
    assert torch.equal(weight[finite], master[finite].bfloat16())
    assert torch.equal(joined[finite].bfloat16(), weight[finite])
    lost = (master.view(torch.int32) - joined.view(torch.int32))[finite]
    ties = (master.view(torch.int32)[finite] & 0x1FFFF) == 0x8000
    assert torch.equal(lost, ties.to(torch.int32))


def test_adamw_on_split_master_weights_is_adamw():
    """Bit by bit, but for the last one of the few master weights that came to lie half-way between two weights."""
    master = randn(1001).float()
    weight, low = torch.empty(1001, dtype=torch.bfloat16), torch.empty(1001, dtype=torch.int16)
    split_master_(master, weight, low)
    whole = [weight.clone(), join_master(weight, low), torch.zeros(1001), torch.zeros(1001)]
    split = [weight, low, torch.zeros(1001), torch.zeros(1001)]
    for step in range(1, 21):
        grad = randn(1001, seed=step).float()
        for state in (whole, split):
            adamw_(*state, grad, config=AdamWConfig(), lr=1e-2, step=step, grad_scale=0.5, decayed=True)
    joined = join_master(weight, low)
    assert torch.equal(joined.bfloat16(), weight)
    assert torch.equal(split[2], whole[2])
    assert torch.equal(split[3], whole[3])
    assert torch.equal(weight, whole[0])
    assert torch.allclose(joined, whole[1], rtol=1e-6, atol=0)
    assert (joined != whole[1]).sum() <= 3


def test_a_split_master_weight_half_way_above_its_weight_loses_one_bit():
    """The update is exactly lr: from 1 to 1 + 2^-8, half-way to the next bf16, which int16 just cannot hold."""
    weight, low = torch.ones(9, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int16)
    state = [torch.zeros(9), torch.zeros(9), torch.full((9,), -1.0)]
    config = AdamWConfig(beta1=0.5, beta2=0.75, eps=1e-30, weight_decay=0.0)
    adamw_(weight, low, *state, config=config, lr=2**-8, step=1, grad_scale=1.0, decayed=True)
    assert weight.tolist() == [1.0] * 9
    assert low.tolist() == [0x7FFF] * 9


def test_sum_of_squares_does_not_depend_on_threads():
    values = randn(200_001).float()
    threads = torch.get_num_threads()
    totals = set()
    for count in (1, 2):
        torch.set_num_threads(count)
        totals.add(sum_of_squares(values).item())
    torch.set_num_threads(threads)
    assert len(totals) == 1
    assert totals.pop() == pytest.approx(values.double().pow(2).sum().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "dim", "width"), [(1, 64, 7), (3, 33, 5), (4, 8, 2), (8, 100, 64), (2, 63, 3), (11, 7, 1), (17, 9, 9)]
)
def test_few_rows_linear(backend, dtype, rows, dim, width):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, dim).to(dtype), torch.randn(width, dim).to(dtype)
    exact = x.double() @ weight.double().t()
    theirs = (F.linear(x, weight).double() - exact).abs().max()
    ours = few_rows_linear(x, weight)
    assert ours.shape == (rows, width)
    if DEVICE == "cpu":  # not one weight more is read
        torch.testing.assert_close(few_rows_linear(at_the_end_of_memory(x), at_the_end_of_memory(weight)), ours)
    strided = torch.stack((x, x), dim=1)[:, 1]
    torch.testing.assert_close(few_rows_linear(strided, weight), ours)
    assert (ours.double() - exact).abs().max() <= 2 * theirs + 1e-6
    bias = torch.randn(width).to(dtype)
    error = (few_rows_linear(x, weight, bias).double() - (exact + bias.double())).abs().max()
    assert error <= 2 * theirs + 1e-6 + torch.finfo(dtype).eps * exact.abs().max()  # the sum is rounded, too
    for row in range(rows - 1):  # a row's result does not depend on its company
        if rows <= FEW and backend == "compiled":
            assert torch.equal(few_rows_linear(x[row : row + 2], weight)[0], ours[row])
