"""Context parallelism and packed documents on 1 to 4 ranks equal one process: loss and every gradient.

The oracle is the plain model in fp64 with an explicit mask, checked against single documents and transformers.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from tiny_models import grads_of, make_model, named_grads, peer_of, tiny_config

from megacoder.core.errors import ConfigError
from megacoder.model.copies import sum_copied_gradients
from megacoder.model.init import init_weights
from megacoder.model.kv_cache import KVCache
from megacoder.model.partition import ExecutionConfig, build_stages
from megacoder.model.places import position_ids
from megacoder.model.stage import Microbatch, Stage, forward_backward, forward_loss
from megacoder.model.transformer import Transformer
from megacoder.ops.attention import attention_backward
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.parallel import context
from megacoder.parallel.collectives import Pending, all_reduce_sum
from megacoder.parallel.context import (
    UNCUT,
    ContextParallel,
    context_attention_backward,
    context_attention_forward,
    gather_keys,
)
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.pipeline import PipelineRunner
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.schedules.placement import place_evenly
from megacoder.parallel.schedules.program import build_program
from megacoder.parallel.tensor import ALONE, TensorParallel

LENGTH = 144
STARTS = [[0, 18, 36, 37, 100], [0], [0, 71, 72, 73, 143]]
"""Of documents, by sequence: on the edges of chunks and beside them, and longer than any chunk."""


def batch_of(config):
    """(tokens, labels, starts) of whole sequences; labels stop at the documents' ends."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (len(STARTS), LENGTH + 1), generator=generator)
    labels, starts = tokens[:, 1:].clone(), torch.zeros(len(STARTS), LENGTH, dtype=torch.bool)
    for sequence, places in enumerate(STARTS):
        starts[sequence, places] = True
        labels[sequence, [place - 1 for place in places[1:]]] = IGNORE_INDEX
    labels[1, 30:50] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), labels, starts


def plain(model, tokens, labels, starts):
    loss = model.loss(tokens, labels, starts_BS=starts)
    loss.backward()
    return loss.item()


def scheduled(model, tokens, labels, starts):
    return forward_backward(model, tokens, labels, starts_BS=starts).total.item()


STEPS = {"plain": plain, "scheduled": scheduled}


@functools.cache
def one_process(config, packed):
    """(loss, {name: gradient}) of autograd in fp64."""
    model = make_model(config).double()
    tokens, labels, starts = batch_of(config)
    return plain(model, tokens, labels, starts if packed else None), named_grads(model)


def step(config, path, packed, dtype, cp=UNCUT, tp=ALONE):
    """(this rank's part of the loss, gradients summed over the context axis)."""
    model = make_model(config, tp=tp, cp=cp)
    flat = FlatParameters(model.named_parameters(), dtype=dtype, device=torch.device("cpu"))
    tokens, labels, starts = batch_of(config)
    loss = STEPS[path](model, tokens, labels, starts if packed else None)
    sum_copied_gradients(model)
    all_reduce_sum(flat.grad, cp.group)
    return loss, grads_of(model)


def step_on_rank(world, config, path, packed, dtype):
    return step(config, path, packed, dtype, ContextParallel(rank=world.rank, size=world.size, group=world.group))


def assert_near(grads, expected, tolerance=1e-5):
    assert {name for name, _, _ in grads} == expected.keys()
    for name, shard, grad in grads:
        assert (grad - shard.part(expected[name])).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_equals_one_process(ranks, size, kv_heads, packed, path):
    config = tiny_config(num_key_value_heads=kv_heads)
    expected_loss, expected = one_process(config, packed)
    if size == 1:
        results = [step(config, path, packed, torch.float32)]
    else:
        results = ranks.run(size, step_on_rank, config, path, packed, torch.float32)
    assert sum(loss for loss, _ in results) == pytest.approx(expected_loss, rel=1e-6)
    for _, grads in results:
        assert_near(grads, expected)


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_bf16_errs_at_most_twice_as_much_as_one_process_in_bf16(ranks, packed, path):
    config = tiny_config(num_key_value_heads=2)
    _, exact = one_process(config, packed)

    def error(grads):
        return sum((grad.double() - exact[name]).pow(2).sum() for name, _, grad in grads).sqrt()

    _, alone = step(config, path, packed, torch.bfloat16)
    for _, grads in ranks.run(4, step_on_rank, config, path, packed, torch.bfloat16):
        assert error(grads) <= 2 * error(alone)


@pytest.mark.parametrize("path", STEPS)
def test_gradients_of_keys_and_values_are_sent_unrounded(path, monkeypatch):
    """In fp32, as the ranks' sums need them; NCCL adds up in the dtype that it is given."""
    cp, sent = ContextParallel(size=2, group=object()), []

    def reduced(shard, full, group):
        sent.append(full)
        return Pending(shard.copy_(full[:2]))

    monkeypatch.setattr(context, "start_reduce_scatter_sum", reduced)
    generator = torch.Generator().manual_seed(0)
    k, v, q, grad_out = torch.randn(4, 1, 2, 32, 8, generator=generator).to(torch.bfloat16)
    q, grad_out = q[:, :, :16], grad_out.view(1, 32, 2, 8)[:, :16]
    if path == "plain":
        monkeypatch.setattr(context, "start_gather_keys", lambda *_: lambda: (k.clone(), v.clone()))
        keys, _ = gather_keys(k[:, :, :16].requires_grad_(), v[:, :, :16], cp)
        keys.sum().backward()
    else:
        out, lse = context_attention_forward(q, k, v, cp, documents=None)
        context_attention_backward(grad_out, q, k, v, out, lse, cp, documents=None)[1]()
        halves = [  # places 0 to 7, and 24 to 31
            attention_backward(
                grad_out[:, part], q[:, :, part], k[:, :, :stop], v[:, :, :stop], out[:, part], lse[:, :, part],
                query_start=stop - 8,
            )[1:]
            for part, stop in ((slice(0, 8), 8), (slice(8, 16), 32))
        ]  # fmt: skip
        expected = torch.stack(halves[1]).float()
        expected[..., :8, :] += torch.stack(halves[0])
        both = torch.cat([expected[..., chunk : chunk + 8, :] for chunk in (0, 24, 8, 16)], dim=-2)
        assert torch.equal(torch.cat(sent[0].chunk(2), dim=-2), both), "the chunks' gradients are added up in fp32"
    assert [full.dtype for full in sent] == [torch.float32]


def test_positions_restart_with_each_document():
    starts = torch.tensor([[1, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0, 0]]).bool()
    assert position_ids(starts).tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.usefixtures("backend")
def test_packed_documents_equal_each_alone(path):
    config = tiny_config(num_key_value_heads=2)
    loss, grads = step(config, path, True, torch.float32)
    model = make_model(config).double()
    tokens, labels, _ = batch_of(config)
    alone = 0.0
    for sequence, places in enumerate(STARTS):
        for first, last in zip(places, [*places[1:], LENGTH], strict=True):
            document = slice(sequence, sequence + 1), slice(first, last)
            alone += plain(model, tokens[document], labels[document], None)
    assert loss == pytest.approx(alone, rel=1e-6)
    assert_near(grads, named_grads(model))


def test_packed_documents_equal_transformers():
    model = make_model(tiny_config(num_key_value_heads=2))
    peer = peer_of(model)
    tokens, labels, starts = batch_of(model.config)
    documents = starts.cumsum(1)
    seen = (documents[:, :, None] == documents[:, None]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    inputs = {"input_ids": tokens, "position_ids": position_ids(starts), "attention_mask": mask}
    with torch.no_grad():
        hidden = model(tokens, starts_BS=starts)
        assert torch.allclose(model.logits(hidden), peer(**inputs).logits, atol=1e-5)
    plain(model, tokens, labels, starts)
    count = (labels != IGNORE_INDEX).sum()
    (peer(**inputs, labels=tokens, shift_labels=labels).loss * count).backward()
    grads = {name: param.grad for name, param in peer.named_parameters()}
    assert_near(grads_of(model), grads, 1e-4)


def axes_of(world, dims):
    """This rank's place and its group along each axis of more than one rank."""
    groups = {}
    for axis in ("cp", "tp", "pp"):
        for members in dims.groups(axis) if dims.size(axis) > 1 else ():
            group = dist.new_group(members)
            if world.rank in members:
                groups[axis] = group
    return dims.coordinates(world.rank), groups


def step_with_tensor_parallelism(world, config, path, packed):
    dims = ParallelDims(tp=2, cp=2)
    place, groups = axes_of(world, dims)
    tp = TensorParallel(rank=place.tp, size=2, group=groups["tp"], sequence_parallel=True)
    cp = ContextParallel(rank=place.cp, size=2, group=groups["cp"])
    return place.tp, *step(config, path, packed, torch.float32, cp, tp)


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 1}, {}, *({"num_key_value_heads": 1, more: True} for more in ("qkv_bias", "qk_norm"))],
    ids=str,
)
def test_with_tensor_and_sequence_parallelism(ranks, changes, packed, path):
    config = tiny_config(**changes)
    expected_loss, expected = one_process(config, packed)
    results = ranks.run(4, step_with_tensor_parallelism, config, path, packed)
    assert sum(loss for tp_rank, loss, _ in results if tp_rank == 0) == pytest.approx(expected_loss, rel=1e-6)
    for _, _, grads in results:
        assert_near(grads, expected)


def pipeline_step(world, config, name, execution):
    """(this rank's part of the loss, gradients of the layers that it holds)."""
    place, groups = axes_of(world, ParallelDims(pp=2, cp=2))
    cp = ContextParallel(rank=place.cp, size=2, group=groups["cp"])
    schedule = build_schedule(name, num_ranks=2, num_microbatches=3)
    num_stages = schedule.stage_map.num_stages
    stages = build_stages(
        config, ALONE, cp=cp, placement=place_evenly(config.num_hidden_layers, num_stages),
        held=schedule.stage_map.stages[place.pp], execution=execution,
    )  # fmt: skip
    model = stages[0].model
    init_weights(model, seed=0)
    flat = FlatParameters(model.named_parameters(), dtype=torch.float32, device=world.device)
    rows = zip(*(tensor.split(1) for tensor in batch_of(config)), strict=True)
    microbatches = [Microbatch.of(tokens, labels, cp=cp, starts_BS=starts) for tokens, labels, starts in rows]
    outputs = PipelineRunner(build_program(schedule), stages, groups["pp"]).run(microbatches).outputs
    all_reduce_sum(flat.grad, cp.group)
    return sum(loss.total.item() for loss in outputs), grads_of(model)


@pytest.mark.parametrize(
    ("name", "block", "recompute"),
    [
        ("1f1b", "scheduled", "full"),
        ("zbv", "scheduled", "none"),
        ("zb-h1", "scheduled", "selective"),
        ("zbv", "scheduled", "norms"),
        ("1f1b", "plain", "full"),
        ("zbv", "plain", "selective"),
    ],
)
def test_packed_documents_through_a_pipeline(ranks, name, block, recompute):
    config = tiny_config(num_hidden_layers=4, num_key_value_heads=2)
    expected_loss, expected = one_process(config, True)
    results = ranks.run(4, pipeline_step, config, name, ExecutionConfig(block=block, recompute=recompute))
    assert sum(loss for loss, _ in results) == pytest.approx(expected_loss, rel=1e-6)
    found = {name for _, grads in results for name, _, _ in grads}
    assert found == expected.keys()
    for _, grads in results:
        assert_near(grads, {name: expected[name] for name, _, _ in grads})


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_hold_each_token_once_and_equal_work(size):
    length = 48
    parts = [ContextParallel(rank=rank, size=size).places(length) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(length))
    assert len({int((part + 1).sum()) for part in parts}) == 1, "keys that the queries see"
    whole = torch.arange(2 * length).view(2, length)
    for rank, part in enumerate(parts):
        assert torch.equal(ContextParallel(rank=rank, size=size).part(whole), whole[:, part])


def test_a_sequence_that_is_not_shared_is_not_copied():
    whole = torch.arange(6).view(2, 3)
    assert UNCUT.part(whole) is whole


@pytest.mark.parametrize(("length", "nearest"), [(18, "16 or 24"), (7, "8")])
def test_a_length_that_ranks_cannot_share_is_refused(length, nearest):
    cp = ContextParallel(size=4)
    message = f"cp = 4: sequences of {length} tokens cannot be cut into 8 equal chunks; .*: {nearest}$"
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with pytest.raises(ConfigError, match=message):
        Microbatch.of(tokens, tokens, cp=cp)
    with pytest.raises(ConfigError, match=message):
        Transformer(tiny_config(), cp=cp)(tokens)


def test_uncut_sequences_are_refused_under_context_parallelism():
    stage, tokens = (
        Stage.whole(Transformer(tiny_config(), cp=ContextParallel(size=2))),
        torch.zeros(1, 8, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=r"whose sequences cp = 2 ranks share; use Microbatch\.of"):
        stage.forward(None, Microbatch(tokens, tokens))


def test_sequences_longer_than_the_rotary_tables_are_refused():
    model, tokens = (
        Transformer(tiny_config(), cp=ContextParallel(size=2)),
        torch.zeros(1, LENGTH + 4, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=f"sequences of {LENGTH + 4} tokens; the model has {LENGTH} positions"):
        forward_loss(model, tokens, tokens)


def test_generation_by_ranks_that_share_sequences_is_refused():
    model, tokens = Transformer(tiny_config(), cp=ContextParallel(size=2)), torch.zeros(1, 8, dtype=torch.int64)
    cache = KVCache(model.config, [8], capacity=9, like=model.norm.weight, tp=ALONE)
    with pytest.raises(ConfigError, match="cp = 2: a cache needs whole sequences; generate with cp = 1"):
        model(tokens, cache=cache)
