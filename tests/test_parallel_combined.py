"""Tensor and pipeline parallelism together on 4 ranks equal one process: losses and every gradient."""

import functools

import pytest
import torch
import torch.distributed as dist
from tiny_models import grads_of, init_with_biases, make_model, named_grads, pipeline_config

from megacoder.model.copies import sum_copied_gradients
from megacoder.model.partition import ExecutionConfig, build_stages, sum_tied_gradients
from megacoder.model.stage import Microbatch
from megacoder.parallel.context import UNCUT
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.pipeline import PipelineRunner
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.schedules.placement import place_evenly
from megacoder.parallel.schedules.program import build_program
from megacoder.parallel.tensor import TensorParallel

NUM_MICROBATCHES = 3


config_of = functools.partial(pipeline_config, num_key_value_heads=1)


def microbatches():
    tokens = torch.randint(0, 61, (NUM_MICROBATCHES, 2, 9), generator=torch.Generator().manual_seed(0))
    return [Microbatch(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


@functools.cache
def one_process(config):
    """Loss sums by microbatch and gradients by name, of autograd in fp64."""
    model = make_model(config, seed=3).double()
    losses = [model.loss(batch.tokens_BS, batch.labels_BS) for batch in microbatches()]
    sum(losses).backward()
    return [loss.item() for loss in losses], named_grads(model)


def group_of(rank, dims, axis):
    groups = [(members, dist.new_group(members)) for members in dims.groups(axis)]
    return next(group for members, group in groups if rank in members)


def step_on_rank(world, name, tied, sequence_parallel, block="scheduled", recompute="none", more=()):
    dims = ParallelDims(tp=2, pp=2)
    place, pp_group = dims.coordinates(world.rank), group_of(world.rank, dims, "pp")
    tp = TensorParallel(
        rank=place.tp, size=dims.tp, group=group_of(world.rank, dims, "tp"), sequence_parallel=sequence_parallel
    )
    schedule = build_schedule(name, num_ranks=dims.pp, num_microbatches=NUM_MICROBATCHES)
    num_stages = schedule.stage_map.num_stages
    stages = build_stages(
        config_of(num_stages, tied, **dict.fromkeys(more, True)), tp, cp=UNCUT,
        placement=place_evenly(num_stages, num_stages), held=schedule.stage_map.stages[place.pp],
        execution=ExecutionConfig(block=block, recompute=recompute),
    )  # fmt: skip
    model = stages[0].model
    init_with_biases(model, seed=3)
    FlatParameters(model.named_parameters(), dtype=torch.float32, device=world.device)
    outputs = PipelineRunner(build_program(schedule), stages, pp_group).run(microbatches()).outputs
    sum_copied_gradients(model)
    sum_tied_gradients(model, stage_map=schedule.stage_map, group=pp_group)
    return num_stages, [loss.total.item() for loss in outputs], grads_of(model)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zbv"])
def test_tensor_by_pipeline_equals_one_process(ranks, name, tied, sequence_parallel):
    check_against_one_process(ranks.run(4, step_on_rank, name, tied, sequence_parallel), tied)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
@pytest.mark.parametrize(
    ("block", "recompute"),
    [
        *(("scheduled", recompute) for recompute in ("norms", "selective", "full")),
        *(("plain", recompute) for recompute in ("none", "selective", "full")),
    ],
)
def test_either_block_equals_one_process_whatever_is_recomputed(ranks, block, recompute, sequence_parallel):
    results = ranks.run(4, step_on_rank, "zbv", True, sequence_parallel, block, recompute)
    check_against_one_process(results, True)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
@pytest.mark.parametrize(("block", "recompute"), [("scheduled", "none"), ("scheduled", "full"), ("plain", "none")])
@pytest.mark.parametrize("more", [("qkv_bias",), ("qk_norm",)], ids=["biases", "normed heads"])
def test_more_weights_of_a_key_value_head_that_ranks_share(ranks, more, block, recompute, sequence_parallel):
    results = ranks.run(4, step_on_rank, "zbv", True, sequence_parallel, block, recompute, more)
    check_against_one_process(results, True, more=more)


def check_against_one_process(results, tied, *, more=()):
    expected_losses, expected = one_process(config_of(results[0][0], tied, **dict.fromkeys(more, True)))
    found = set()
    for _, losses, grads in results:
        assert losses in ([], pytest.approx(expected_losses, rel=1e-6))
        for weight, shard, grad in grads:
            part = shard.part(expected[weight])
            assert (grad - part).norm() <= 1e-5 * expected[weight].norm(), weight
            found.add(weight)
    assert found == expected.keys()
    assert sum(losses != [] for _, losses, _ in results) == 2
