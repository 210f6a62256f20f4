"""Flat buffers: every parameter and its gradient are views of them, however the gradient is computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import batch_of, tiny
from tiny_models import make_model
from torch import nn

from megacoder.model.stage import forward_backward
from megacoder.parallel.flat import ALIGNMENT, FlatParameters

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def parameters_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return [(f"p{index}", nn.Parameter(torch.randn(shape, generator=generator))) for index, shape in enumerate(shapes)]


def padding_of(flat):
    is_padding = torch.ones(flat.numel, dtype=torch.bool)
    for slot in flat.slots:
        is_padding[slot.start : slot.stop] = False
    return is_padding


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=6),
    num_shards=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_layout(shapes, num_shards, dtype):
    parameters = parameters_of(shapes)
    before = [param.detach().clone() for _, param in parameters]
    flat = FlatParameters(parameters, dtype=dtype, device=CPU, num_shards=num_shards)
    assert [(slot.name, slot.param) for slot in flat.slots] == parameters
    assert flat.numel == flat.weight.numel() == flat.grad.numel()
    assert (flat.weight.dtype, flat.grad.dtype) == (dtype, torch.float32)
    stop = 0
    for slot, weight in zip(flat.slots, before, strict=True):
        assert slot.start % ALIGNMENT == 0
        assert slot.start >= stop
        stop = slot.stop
        assert torch.equal(slot.param, weight.to(dtype))
        assert slot.param.data_ptr() == flat.weight[slot.start :].data_ptr()
        assert slot.param.grad.data_ptr() == flat.grad[slot.start :].data_ptr()
        assert slot.param.grad.shape == slot.param.shape
    assert not flat.weight[padding_of(flat)].any()
    assert not flat.grad.any()
    # No more padding at the end than equal, aligned shards need.
    assert flat.numel - stop < ALIGNMENT * (num_shards + 1)


CASES = {
    "shapes": st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=6),
    "num_shards": st.integers(1, 9),
    "bucket_elements": st.integers(1, 6000),
    "late": st.sets(st.integers(0, 5)),
}


def cut(shapes, num_shards, bucket_elements, late):
    """(parameters, their flat buffers); `late` are indices of some that may be there."""
    parameters = parameters_of(shapes)
    chosen = [param for index, (_, param) in enumerate(parameters) if index in late]
    return parameters, FlatParameters(
        parameters, dtype=torch.float32, device=CPU, num_shards=num_shards, late=chosen, bucket_elements=bucket_elements
    )


@settings(max_examples=50, deadline=None)
@given(**CASES)
def test_buckets_cover_the_buffer_and_late_parameters_have_their_own(shapes, num_shards, bucket_elements, late):
    parameters, flat = cut(shapes, num_shards, bucket_elements, late)
    assert [bucket.start for bucket in flat.buckets] + [flat.numel] == [0] + [bucket.stop for bucket in flat.buckets]
    assert [slot for bucket in flat.buckets for slot in bucket.slots] == flat.slots
    for bucket in flat.buckets:
        assert bucket.slots[0].start == bucket.start
        assert bucket.slots[-1].stop <= bucket.stop
        assert parameters[bucket.first_use] == (bucket.slots[0].name, bucket.slots[0].param)
        assert {int(slot.name[1:]) in late for slot in bucket.slots} == {bucket.late}
        assert bucket.slots[-1].start - bucket.start < bucket_elements  # it was not full before
    for is_late in (False, True):
        buckets = [bucket for bucket in flat.buckets if bucket.late == is_late]
        for bucket in buckets[:-1]:  # it was full at its end
            assert bucket.slots[-1].start - bucket.start + ALIGNMENT + bucket.slots[-1].param.numel() > bucket_elements
        names = [slot.name for bucket in buckets for slot in bucket.slots]
        assert names == sorted(names)


@settings(max_examples=50, deadline=None)
@given(**CASES)
def test_shards_are_equal_and_own_every_element_once(shapes, num_shards, bucket_elements, late):
    parameters, flat = cut(shapes, num_shards, bucket_elements, late)
    covered = {name: torch.zeros(param.numel(), dtype=torch.int64) for name, param in parameters}
    for index in range(num_shards):
        shards = [flat.shard(bucket, index) for bucket in flat.buckets]
        assert {(shard.stop - shard.start) % ALIGNMENT for shard in shards} == {0}
        state = torch.cat([flat.weight[shard] for shard in shards])
        assert len(state) * num_shards == flat.numel
        for owned in flat.owned(index):
            assert 0 <= owned.start < owned.stop <= owned.slot.param.numel()
            covered[owned.slot.name][owned.start : owned.stop] += 1
            part = owned.slot.param.detach().flatten()[owned.start : owned.stop]
            assert torch.equal(state[owned.offset :][: len(part)], part)
    for name, times in covered.items():
        assert (times == 1).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_and_the_scheduled_step_accumulate_into_the_same_fp32_memory(dtype):
    config = tiny()
    tokens, labels = batch_of(config)
    model = make_model(config)
    flat = FlatParameters(model.named_parameters(), dtype=dtype, device=CPU)
    memory = flat.grad.data_ptr()

    model.loss(tokens, labels).backward()
    by_autograd = flat.grad.clone()
    assert by_autograd.any()
    model.loss(tokens, labels).backward()
    assert torch.equal(flat.grad, 2 * by_autograd)  # the same twice: fp32 loses nothing

    flat.grad.zero_()
    forward_backward(model, tokens, labels)
    by_hand = flat.grad.clone()
    assert (by_hand - by_autograd).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * by_autograd.norm()
    model.loss(tokens, labels).backward()
    assert torch.equal(flat.grad, by_hand + by_autograd)

    assert flat.grad.data_ptr() == memory
    for slot in flat.slots:
        assert slot.param.grad.dtype == torch.float32
        assert slot.param.grad.data_ptr() == flat.grad[slot.start :].data_ptr()
    assert not flat.grad[padding_of(flat)].any()


def test_gradients_of_bf16_weights_keep_what_bf16_would_lose():
    weight = nn.Parameter(torch.ones(4))
    flat = FlatParameters([("weight", weight)], dtype=torch.bfloat16, device=CPU)
    for scale in (1.0, 2.0**-12):  # 1 + 2^-12 is 1 in bf16
        (weight * scale).sum().backward()
    assert flat.grad[:4].tolist() == [1 + 2.0**-12] * 4


def test_tied_weights_are_in_the_buffer_once():
    config = tiny(tie_word_embeddings=True)
    model = make_model(config)
    flat = FlatParameters(model.named_parameters(), dtype=torch.float32, device=CPU)
    names = [slot.name for slot in flat.slots]
    assert "embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert sum(slot.param.numel() for slot in flat.slots) == sum(param.numel() for param in model.parameters())
    assert model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr() == flat.weight.data_ptr()
    model.lm_head.weight.grad[0, 0] = 7.0
    assert flat.grad[0] == 7.0


def test_writing_the_buffer_changes_the_model():
    model = make_model(tiny())
    tokens, labels = batch_of(model.config)
    flat = FlatParameters(model.named_parameters(), dtype=torch.float32, device=CPU)
    other = make_model(tiny(), seed=1)
    flat.weight.copy_(FlatParameters(other.named_parameters(), dtype=torch.float32, device=CPU).weight)
    assert model.loss(tokens, labels).item() == other.loss(tokens, labels).item()
