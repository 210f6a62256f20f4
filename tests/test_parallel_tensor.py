"""Tensor parallelism on 2 and 4 ranks equals one process: loss, every gradient, norm, weights after updates."""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from tiny_models import grads_of, make_model, named_grads, tiny_config

from megacoder.checkpoint.boxes import Box, find_fault
from megacoder.core.errors import ConfigError
from megacoder.model import transformer
from megacoder.model.copies import counted_elsewhere, sum_copied_gradients
from megacoder.model.plain_stage import PlainStage
from megacoder.model.stage import Microbatch, Stage, forward_backward, forward_loss
from megacoder.model.transformer import Attention, RMSNorm, Transformer, weight_pieces
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.cross_entropy import CHUNK_ELEMENTS, IGNORE_INDEX
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import FlatParameters, OwnedRange
from megacoder.parallel.tensor import ALONE, TensorParallel
from megacoder.parallel.world import World
from megacoder.parallel.zero import Zero1AdamW
from megacoder.train.fragments import state_fragments


def batch_of(config):
    tokens = torch.randint(0, config.vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[1, 4:9] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), labels.contiguous()


def build(config, tp=ALONE, dtype=torch.float32, num_shards=1):
    model = make_model(config, tp=tp)
    return model, FlatParameters(
        model.named_parameters(), dtype=dtype, device=torch.device("cpu"), num_shards=num_shards
    )


def plain(model, tokens, labels):
    loss = model.loss(tokens, labels)
    loss.backward()
    return loss.item()


def scheduled(model, tokens, labels):
    return forward_backward(model, tokens, labels).total.item()


STEPS = {"plain": plain, "scheduled": scheduled}


def on_axis(world, *, sequence_parallel):
    return TensorParallel(rank=world.rank, size=world.size, group=world.group, sequence_parallel=sequence_parallel)


def assembled(ranks_parts):
    """{name: whole tensor} of every rank's [(name, shard, part)]; copies must agree, every element be somewhere."""
    wholes = {}
    for name, shard, part in itertools.chain.from_iterable(ranks_parts):
        here = shard.part(wholes.setdefault(name, torch.full(shard.shape, torch.nan)))
        if shard.copy > 0:
            assert (here - part).norm() <= 1e-6 * part.norm(), f"copies of {name} differ"
        here.copy_(part)
    return wholes


def assert_near(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert (tensor - expected[name]).norm() <= tolerance * expected[name].norm(), name


@functools.cache
def one_process(config):
    """(loss, {name: gradient}) of autograd in fp64."""
    model = make_model(config).double()
    return plain(model, *batch_of(config)), named_grads(model)


def staged(kind, recompute, model, tokens, labels):
    """The step of a stage that is the whole model, whose evaluation must find the same loss."""
    stage, microbatch = kind.whole(model, recompute=recompute), Microbatch(tokens, labels)
    loss, saved = stage.forward(None, microbatch)
    assert stage.backward(None, saved) is None
    assert stage.evaluate(None, microbatch) == loss
    return loss.total.item()


KINDS_OF_STAGE = {
    f"{kind.__name__}, {recompute}": functools.partial(staged, kind, recompute)
    for kind, more in ((Stage, ("norms",)), (PlainStage, ()))
    for recompute in ("none", *more, "selective", "full")
}


def step_on_rank(world, config, path, sequence_parallel, dtype):
    """(loss, gradients, norm of the padding's gradients)."""
    model, flat = build(config, on_axis(world, sequence_parallel=sequence_parallel), dtype)
    loss = (STEPS | KINDS_OF_STAGE)[path](model, *batch_of(config))
    sum_copied_gradients(model)
    grads = grads_of(model)
    named = sum(grad.double().pow(2).sum() for _, _, grad in grads)
    return loss, grads, (flat.grad.double().pow(2).sum() - named).item() / named.item()


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_a_step_equals_one_process(ranks, size, kv_heads, tied, sequence_parallel, path):
    config = tiny_config(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    expected_loss, expected = one_process(config)
    results = ranks.run(size, step_on_rank, config, path, sequence_parallel, torch.float32)
    assert [loss for loss, _, _ in results] == pytest.approx([expected_loss] * size, rel=1e-6)
    assert [padding for _, _, padding in results] == pytest.approx([0.0] * size, abs=1e-12)
    assert_near(assembled(grads for _, grads, _ in results), expected)


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
@pytest.mark.parametrize(("size", "kv_heads"), [(2, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("more", ["qkv_bias", "qk_norm"])
def test_a_step_with_more_weights_equals_one_process(ranks, more, size, kv_heads, sequence_parallel, path):
    config = tiny_config(num_key_value_heads=kv_heads, **{more: True})
    expected_loss, expected = one_process(config)
    results = ranks.run(size, step_on_rank, config, path, sequence_parallel, torch.float32)
    assert [loss for loss, _, _ in results] == pytest.approx([expected_loss] * size, rel=1e-6)
    assert_near(assembled(grads for _, grads, _ in results), expected)


@pytest.mark.parametrize("path", KINDS_OF_STAGE)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_kind_of_stage_and_recomputation_equals_one_process(ranks, tied, sequence_parallel, path):
    config = tiny_config(num_key_value_heads=1, tie_word_embeddings=tied)
    expected_loss, expected = one_process(config)
    results = ranks.run(2, step_on_rank, config, path, sequence_parallel, torch.float32)
    assert [loss for loss, _, _ in results] == pytest.approx([expected_loss] * 2, rel=1e-6)
    assert_near(assembled(grads for _, grads, _ in results), expected)


class AttentionWithNormedQueries(Attention):
    """A change as users make it: a norm of each query head, without a backward."""

    def __init__(self, config, tp, *, cp):
        super().__init__(config, tp, cp=cp)
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.query_norm.sees_own_heads = True
        self.qkv_proj.register_forward_hook(self._norm_queries)

    def _norm_queries(self, _, args, qkv):
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        queries, others = heads.split([self.num_heads, 2 * self.num_kv_heads], dim=-2)
        return torch.cat([self.query_norm(queries), others], -2).flatten(-2)


def changed_step_on_rank(world, config, sequence_parallel):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "Attention", AttentionWithNormedQueries)
        tp = ALONE if world is None else on_axis(world, sequence_parallel=sequence_parallel)
        model, _ = build(config, tp)
        loss = staged(PlainStage, "none", model, *batch_of(config))
        sum_copied_gradients(model)
        with pytest.raises(ConfigError, match=r"does not know, or lack some: self_attn\.query_norm\.weight; set"):
            Stage.whole(model)
        return loss, grads_of(model)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
def test_a_changed_layer_trains_as_in_one_process(ranks, sequence_parallel):
    config = tiny_config()
    expected_loss, parts = changed_step_on_rank(None, config, False)
    results = ranks.run(2, changed_step_on_rank, config, sequence_parallel)
    assert [loss for loss, _ in results] == pytest.approx([expected_loss] * 2, rel=1e-6)
    assert_near(assembled(grads for _, grads in results), assembled([parts]))


@pytest.mark.parametrize("path", [*STEPS, *KINDS_OF_STAGE])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
def test_bf16_errs_at_most_twice_as_much_as_one_process_in_bf16(ranks, sequence_parallel, path):
    config = tiny_config(num_key_value_heads=2)
    _, exact = one_process(config)
    alone, _ = build(config, dtype=torch.bfloat16)
    (STEPS | KINDS_OF_STAGE)[path](alone, *batch_of(config))
    results = ranks.run(4, step_on_rank, config, path, sequence_parallel, torch.bfloat16)

    def error(parts):
        return sum((part.double() - shard.part(exact[name])).pow(2).sum() for name, shard, part in parts).sqrt()

    assert error((name, shard, part) for _, parts, _ in results for name, shard, part in parts if not shard.copy) <= (
        2 * error(grads_of(alone))
    )


def two_microbatches(world, config, chunk_elements):
    model, _ = build(config, on_axis(world, sequence_parallel=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_ELEMENTS, "cpu", chunk_elements)
        tokens, labels = batch_of(config)
        scored = forward_loss(model, tokens, labels).total.item()
        counts = [
            forward_backward(model, *half).num_tokens for half in zip(tokens.split(2), labels.split(2), strict=True)
        ]
    sum_copied_gradients(model)
    return scored, counts, grads_of(model)


def test_microbatches_add_up_and_chunks_of_tokens_change_nothing(ranks):
    config = tiny_config(num_key_value_heads=1)
    expected_loss, expected = one_process(config)
    results = ranks.run(2, two_microbatches, config, 64 * 7)  # seven tokens a chunk, the last one ragged
    assert [scored for scored, _, _ in results] == pytest.approx([expected_loss] * 2, rel=1e-6)
    assert [counts for _, counts, _ in results] == [[27, 32]] * 2
    assert_near(assembled(grads for _, _, grads in results), expected)


def updates(config, tp, replicas):
    """([norm of two updates], [(name, shard, weight)]); each replica takes its rows of the batch."""
    model, flat = build(config, tp, num_shards=replicas.size)
    optimizer = Zero1AdamW(
        flat,
        replicas.group,
        AdamWConfig(),
        norm_group=dist.group.WORLD,
        counted_elsewhere=counted_elsewhere(model, flat),
    )
    tokens, labels = (tensor.chunk(replicas.size)[replicas.rank] for tensor in batch_of(config))
    norms = []
    for _ in range(2):
        forward_backward(model, tokens, labels)
        sum_copied_gradients(model)
        norms.append(optimizer.step(lr=1e-2, num_tokens=59, max_grad_norm=0.1))
    return norms, [(piece.hf_name, piece.shard, piece.view.clone()) for piece in weight_pieces(model)]


def updates_on_rank(world, config, dims, sequence_parallel):
    place = dims.coordinates(world.rank)
    groups = {axis: [dist.new_group(members) for members in dims.groups(axis)] for axis in ("tp", "dp")}
    mine = {
        axis: next(
            group for group, members in zip(groups[axis], dims.groups(axis), strict=True) if world.rank in members
        )
        for axis in groups
    }
    tp = TensorParallel(rank=place.tp, size=dims.tp, group=mine["tp"], sequence_parallel=sequence_parallel)
    return updates(config, tp, World(place.dp, dims.dp, 0, world.device, mine["dp"]))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
@pytest.mark.parametrize("dims", [ParallelDims(tp=4), ParallelDims(tp=2, dp=2)], ids=str)
def test_norm_and_weights_after_updates_equal_one_process(ranks, dims, sequence_parallel):
    config = tiny_config(num_key_value_heads=1)
    expected_norms, expected = updates(config, ALONE, World(0, 1, 0, torch.device("cpu"), None))
    results = ranks.run(4, updates_on_rank, config, dims, sequence_parallel)
    for norms, _ in results:
        assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert_near(
        assembled(parts for _, parts in results[: dims.tp]), {name: weight for name, _, weight in expected}, 1e-4
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_first_copies_cover_every_weight_once_and_start_equal(size, kv_heads):
    config = tiny_config(num_key_value_heads=kv_heads)
    whole = {piece.hf_name: piece.view for piece in weight_pieces(build(config)[0])}
    boxes = {name: [] for name in whole}
    for rank in range(size):
        for piece in weight_pieces(build(config, TensorParallel(rank=rank, size=size))[0]):
            assert piece.shard.shape == whole[piece.hf_name].shape
            assert torch.equal(piece.view, piece.shard.part(whole[piece.hf_name])), piece.hf_name
            if piece.shard.copy == 0:
                boxes[piece.hf_name].append(Box(piece.shard.offsets, piece.shard.local_shape))
    for name, weight in whole.items():
        assert find_fault(Box.whole(weight.shape), boxes[name]) is None, name


@dataclass(frozen=True)
class State:
    """What a checkpoint reads of a rank's optimizer, with no process beside it."""

    owned: list[OwnedRange]
    master: torch.Tensor

    def state(self):
        return dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), self.master)


def laid_out(config, dims, rank):
    """(model, state) of a rank; with one replica the state's memory is the weights'."""
    place = dims.coordinates(rank)
    model, flat = build(config, TensorParallel(rank=place.tp, size=dims.tp), num_shards=dims.dp)
    return model, State(list(flat.owned(place.dp)), flat.weight[: flat.numel // dims.dp])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_checkpoint_holds_every_element_once(kv_heads):
    config, dims = tiny_config(num_key_value_heads=kv_heads), ParallelDims(tp=4, dp=2)
    boxes = {}
    for rank in range(dims.world_size):
        model, optimizer = laid_out(config, dims, rank)
        for fragment in state_fragments(model, optimizer.owned, optimizer.state(), copies=False):
            boxes.setdefault((fragment.kind, fragment.name), []).extend(fragment.boxes())
    pieces = list(weight_pieces(build(config)[0]))
    assert len(boxes) == 3 * len(pieces)
    for kind, piece in itertools.product(("weight", "exp_avg", "exp_avg_sq"), pieces):
        assert find_fault(Box.whole(piece.shard.shape), boxes[kind, piece.hf_name]) is None, piece.hf_name


def test_every_rank_reads_all_it_holds():
    config, dims = tiny_config(num_key_value_heads=1), ParallelDims(tp=4)
    whole = {piece.hf_name: piece.view for piece in weight_pieces(build(config)[0])}
    for rank in range(dims.world_size):
        model, optimizer = laid_out(config, dims, rank)
        optimizer.master.fill_(torch.nan)
        for fragment in state_fragments(model, optimizer.owned, optimizer.state(), copies=True):
            weight = whole[fragment.name]
            held = weight[fragment.region.inside(Box.whole(weight.shape))].flatten()
            fragment.data.copy_(held[fragment.start : fragment.stop])
        for piece in weight_pieces(model):
            assert torch.equal(piece.view, piece.shard.part(whole[piece.hf_name])), piece.hf_name


def label_error(world, config):
    model, _ = build(config, on_axis(world, sequence_parallel=False))
    tokens, labels = batch_of(config)
    labels[2, 3] = config.vocab_size  # a row of the weights, but padding
    messages = []
    for step in STEPS.values():
        with pytest.raises(IndexError) as raised:
            step(model, tokens, labels)
        messages.append(str(raised.value))
    return messages


def test_a_label_of_the_padding_is_refused_on_every_rank(ranks):
    assert ranks.run(2, label_error, tiny_config()) == [["label 90 is outside the vocabulary of 90 ids"] * 2] * 2


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (0, {}, "tp = 0: must be at least 1; nearest that work: tp = 1 or 2"),
        (3, {}, "tp = 3: model.num_attention_heads = 4 is not a multiple of 3; nearest that work: tp = 2 or 4"),
        (4, {"intermediate_size": 54}, "tp = 4: model.intermediate_size = 54 is not a .* tp = 1 or 2"),
        (4, {"vocab_multiple": 10}, "tp = 4: the vocabulary, padded to 90 by model.vocab_multiple = 10, is"),
        (
            4, {"num_attention_heads": 12, "num_key_value_heads": 6},
            "tp = 4: model.num_key_value_heads = 6 is neither a multiple nor a divisor of 4; .* tp = 1 or 2",
        ),
    ],
)  # fmt: skip
def test_a_size_that_cannot_share_the_model_is_refused(size, changes, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(tiny_config(**changes), TensorParallel(size=size))


def test_tokens_that_sequence_parallelism_cannot_share_are_refused():
    model, _ = build(tiny_config(), TensorParallel(size=4, sequence_parallel=True))
    tokens = torch.zeros(1, 18, dtype=torch.int64)
    for step in STEPS.values():
        with pytest.raises(ConfigError, match=r"tp = 4: 1 x 18 tokens .* nearest sequence lengths that work: 16 or 20"):
            step(model, tokens, tokens)


def test_logits_of_shared_tokens_are_refused():
    model, _ = build(tiny_config(), TensorParallel(size=2, sequence_parallel=True))
    message = "logits need all tokens on every rank; generate with sequence_parallel = false"
    with pytest.raises(ConfigError, match=message):
        model.logits(torch.zeros(1, 1, 32))
