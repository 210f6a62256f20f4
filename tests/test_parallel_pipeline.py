"""The pipeline against one process: losses, every gradient, memory, order, on gloo ranks and on one rank alone.

The oracle is the plain model in fp64 under autograd, which shares no code with stages or runner.
"""

import functools
import weakref
from dataclasses import dataclass

import pytest
import torch
from tiny_models import make_model, named_grads, pipeline_config

from megacoder.model.init import init_weights
from megacoder.model.partition import ExecutionConfig, build_stages, sum_tied_gradients
from megacoder.model.stage import Microbatch, forward_backward
from megacoder.model.transformer import Transformer
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.parallel.collectives import sum_with_peer
from megacoder.parallel.context import UNCUT
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.pipeline import PipelineRunner
from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.placement import Placement, place_evenly
from megacoder.parallel.schedules.program import build_program
from megacoder.parallel.schedules.schedule import ScheduleError
from megacoder.parallel.schedules.validate import peak_live
from megacoder.parallel.schedules.waiting import limit_waiting
from megacoder.parallel.tensor import ALONE

RECOMPUTE = ("none", "selective", "full")
UNEVEN = {1: (3,), 2: (3, 1), 4: (0, 3, 1, 0), 8: (0, 2, 1, 1, 1, 1, 2, 0)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As the ranks have; for matrices of 16 columns two threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def placement_of(kind, num_stages):
    return place_evenly(num_stages, num_stages) if kind == "even" else Placement(UNEVEN[num_stages])


def microbatches_of(count, vocab=61):
    """Each with another number of ignored labels, the last with nothing but them."""
    generator = torch.Generator().manual_seed(count)
    batches = []
    for index in range(count):
        tokens = torch.randint(0, vocab, (2, 8), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[0, : index % 7] = IGNORE_INDEX
        if index and index == count - 1:
            labels.fill_(IGNORE_INDEX)
        batches.append(Microbatch(tokens[:, :-1].contiguous(), labels))
    return batches


@functools.cache
def oracle(num_layers, tied, count):
    """Loss sums by microbatch, gradients by Hugging Face name."""
    model = make_model(pipeline_config(num_layers, tied), seed=3).double()
    losses = [model.loss(batch.tokens_BS, batch.labels_BS) for batch in microbatches_of(count)]
    sum(losses).backward()
    return [loss.item() for loss in losses], named_grads(model)


def attach(model, dtype=torch.float32):
    """Draws the weights and gives them gradient buffers."""
    init_weights(model, seed=3)
    return FlatParameters(model.named_parameters(), dtype=dtype, device=torch.device("cpu"))


@dataclass
class Step:
    """What one rank returns."""

    losses: list[float]
    num_tokens: list[int]
    grads: dict[str, torch.Tensor]
    peak_live: int


def train_step(world, name, kind, tied, count, *, dtype=torch.float32, times=1, waiting_share=None, **execution):
    """The last of `times` equal steps; AssertionError unless they give the same bits."""
    schedule = build_schedule(name, num_ranks=world.size, num_microbatches=count)
    placement = placement_of(kind, schedule.stage_map.num_stages)
    config = pipeline_config(sum(placement.layers_per_stage), tied)
    if waiting_share is not None:
        layers = placement.layers_per_stage
        schedule = limit_waiting(schedule, layers=layers, waiting_share=waiting_share)
    held = schedule.stage_map.stages[world.rank]
    stages = build_stages(
        config, ALONE, cp=UNCUT, placement=placement, held=held, execution=ExecutionConfig(**execution)
    )
    model = stages[0].model
    flat = attach(model, dtype)
    runner = PipelineRunner(build_program(schedule), stages, world.group)
    first_grad = None
    for _ in range(times):
        flat.grad.zero_()
        result = runner.run(microbatches_of(count))
        sum_tied_gradients(model, stage_map=schedule.stage_map, group=world.group)
        if first_grad is None:
            first_grad, first_outputs = flat.grad.clone(), result.outputs
        assert torch.equal(flat.grad, first_grad)
        assert [loss.total.item() for loss in result.outputs] == [loss.total.item() for loss in first_outputs]
    return Step(
        [loss.total.item() for loss in result.outputs], [loss.num_tokens for loss in result.outputs],
        named_grads(model), result.peak_live,
    )  # fmt: skip


def train_steps(world, cases):
    return [train_step(world, *case, times=2 if case[-1] == 3 else 1) for case in cases]


def check_against_oracle(case, results):
    """`results` of all ranks, for one case."""
    name, kind, tied, count = case
    schedule = build_schedule(name, num_ranks=len(results), num_microbatches=count)
    num_layers = sum(placement_of(kind, schedule.stage_map.num_stages).layers_per_stage)
    losses, expected = oracle(num_layers, tied, count)
    assert [loss for step in results for loss in step.losses] == pytest.approx(losses, rel=1e-6)
    counted = [int((batch.labels_BS != IGNORE_INDEX).sum()) for batch in microbatches_of(count)]
    assert [tokens for step in results for tokens in step.num_tokens] == counted
    for rank, step in enumerate(results):
        assert step.peak_live == peak_live(schedule.ranks[rank]), rank
        for hf_name, grad in step.grads.items():
            assert (grad - expected[hf_name]).norm() <= 1e-5 * expected[hf_name].norm(), (rank, hf_name)
    assert {hf_name for step in results for hf_name in step.grads} == set(expected)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", [2, 4])
def test_pipeline_equals_one_process(ranks, size, name):
    cases = [
        (name, kind, tied, count)
        for kind in ("even", "uneven")
        for tied in (False, True)
        for count in (1, 3, 2 * size + 1)
    ]
    results = ranks.run(size, train_steps, cases)
    for case, by_rank in zip(cases, zip(*results, strict=True), strict=True):
        check_against_oracle(case, by_rank)


def steps_of_every_recompute(world, block, cases):
    return [[train_step(world, *case, times=2, block=block, recompute=mode) for mode in RECOMPUTE] for case in cases]


@pytest.mark.parametrize("block", ["scheduled", "plain"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_either_block_equals_one_process_and_recomputing_changes_no_bit(ranks, name, block):
    cases = [(name, "uneven", tied, 3) for tied in (False, True)]
    results = ranks.run(2, steps_of_every_recompute, block, cases)
    for case, by_rank in zip(cases, zip(*results, strict=True), strict=True):
        check_against_oracle(case, [steps[0] for steps in by_rank])
        for kept, *recomputed in by_rank:
            for step in recomputed:
                assert (step.losses, step.peak_live) == (kept.losses, kept.peak_live)
                assert [
                    weight for weight in kept.grads if not torch.equal(step.grads[weight], kept.grads[weight])
                ] == []


def steps_of_every_share(world, name):
    return [
        train_step(world, name, "uneven", True, 5, dtype=torch.bfloat16, waiting_share=share, recompute=mode)
        for share, mode in ((None, "none"), (1.4, "norms"), (2.7, "selective"), (16.1, "full"))
    ]


@pytest.mark.parametrize("name", ["zb-h1", "zbv", "dualpipev"])
def test_computing_weight_gradients_early_changes_no_bit(ranks, name):
    for steps in ranks.run(2, steps_of_every_share, name):
        for step in steps[1:]:
            assert step.losses == steps[0].losses
            assert [
                weight for weight, grad in steps[0].grads.items() if not torch.equal(step.grads[weight], grad)
            ] == []


class Alone:
    """A world of one, without a process group."""

    rank, size, group = 0, 1, None


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tied", [False, True])
def test_one_rank_needs_no_process_group(name, tied):
    for count in (1, 4):
        case = (name, "uneven", tied, count)
        check_against_oracle(case, [train_step(Alone, *case)])


def plain_loop(num_layers, count, dtype=torch.float32):
    """Gradients of the whole model by forward_backward, one microbatch after the other."""
    model = Transformer(pipeline_config(num_layers, False))
    attach(model, dtype)
    for batch in microbatches_of(count):
        forward_backward(model, batch.tokens_BS, batch.labels_BS)
    return named_grads(model)


def differing_gradients(world, name, count):
    step = train_step(world, name, "uneven", False, count)
    num_stages = build_schedule(name, num_ranks=world.size, num_microbatches=count).stage_map.num_stages
    expected = plain_loop(sum(UNEVEN[num_stages]), count)
    return [hf_name for hf_name, grad in step.grads.items() if not torch.equal(grad, expected[hf_name])]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_pipeline_changes_no_bit_in_fp32(ranks, name):
    """Microbatches pass every stage in order, so that even the order of additions is that of one process."""
    assert differing_gradients(Alone, name, 4) == []
    assert ranks.run(2, differing_gradients, name, 5) == [[], []]


def bf16_gradients(world, name, count):
    return train_step(world, name, "even", False, count, dtype=torch.bfloat16).grads


@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_bf16_errs_at_most_twice_as_much_as_one_process_in_bf16(ranks, name):
    first, second = ranks.run(2, bf16_gradients, name, 5)
    num_layers = build_schedule(name, num_ranks=2, num_microbatches=5).stage_map.num_stages
    _, exact = oracle(num_layers, False, 5)

    def error(grads):
        return sum((grads[hf_name] - exact[hf_name]).pow(2).sum() for hf_name in exact).sqrt()

    assert error(first | second) <= 2 * error(plain_loop(num_layers, 5, torch.bfloat16))


class Tracked:
    """Counts the instances and tensors that are alive."""

    def __init__(self):
        self.alive = self.peak = 0

    def add(self, thing):
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        weakref.finalize(thing, self._remove)
        return thing

    def _remove(self):
        self.alive -= 1


class Kept:
    """What a forward, or an I, leaves for later."""


class TracedStage:
    """Passes tensors on; notes every call, what is kept and which tensors it made are alive."""

    def __init__(self, chunk, is_first, is_last, calls, kept, made):
        self.chunk, self.is_first, self.is_last = chunk, is_first, is_last
        self.calls, self.kept, self.made = calls, kept, made

    def new_boundary(self, microbatch):
        return torch.empty(3)

    def forward(self, x, microbatch):
        assert (x is None) == self.is_first
        self.calls.append(f"F{microbatch}.{self.chunk}")
        kept = self.kept.add(Kept())
        kept.microbatch = microbatch
        if self.is_first:
            x = torch.full((3,), float(microbatch))
        assert x.tolist() == [microbatch] * 3
        return microbatch if self.is_last else self.made.add(x.clone()), kept

    def backward(self, grad, saved):
        self.calls.append(f"B{saved.microbatch}.{self.chunk}")
        return self._gradient(grad, saved.microbatch)

    def backward_input(self, grad, saved):
        microbatch = saved.microbatch
        self.calls.append(f"I{microbatch}.{self.chunk}")
        return self._gradient(grad, microbatch), lambda: self._weight(saved)

    def _weight(self, saved):
        self.calls.append(f"W{saved.microbatch}.{self.chunk}")

    def _gradient(self, grad, microbatch):
        assert (grad is None) == self.is_last
        if self.is_last:
            grad = torch.full((3,), -float(microbatch))
        assert grad.tolist() == [-microbatch] * 3
        return None if self.is_first else self.made.add(grad.clone())


def trace(world, name, count):
    schedule = build_schedule(name, num_ranks=world.size, num_microbatches=count)
    calls, kept, made = [], Tracked(), Tracked()
    last = schedule.stage_map.num_stages - 1
    stages = [
        TracedStage(chunk, stage == 0, stage == last, calls, kept, made)
        for chunk, stage in enumerate(schedule.stage_map.stages[world.rank])
    ]
    result = PipelineRunner(build_program(schedule), stages, world.group).run(range(count))
    return calls, kept.peak, kept.alive, made.peak, made.alive, result.peak_live, result.outputs


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", [2, 4])
def test_runner_follows_the_list_and_holds_no_more_than_predicted(ranks, size, name):
    count = 24
    schedule = build_schedule(name, num_ranks=size, num_microbatches=count)
    outputs = []
    for rank, traced in enumerate(ranks.run(size, trace, name, count)):
        calls, kept_peak, kept_alive, made_peak, made_alive, measured, results = traced
        assert calls == [str(action) for action in schedule.ranks[rank]]
        assert kept_peak == measured == peak_live(schedule.ranks[rank])
        assert (kept_alive, made_alive) == (0, 0)
        if name != "gpipe":  # all of whose activations are on their way at once
            assert made_peak <= 3 * size  # whatever the number of microbatches
        outputs += results
    assert outputs == list(range(count))


def sum_of_pair(world, values):
    tensor = torch.tensor(values[world.rank])
    if world.rank in (0, 2):
        sum_with_peer(tensor, 2 - world.rank, world.group)
    return tensor.tolist()


def test_sum_with_peer_leaves_other_ranks_unchanged(ranks):
    assert ranks.run(3, sum_of_pair, [[1.0, 2.0], [5.0, 5.0], [0.1, 4.0]]) == [
        pytest.approx([1.1, 6.0]), [5.0, 5.0], pytest.approx([1.1, 6.0])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_ranks", "num_stages", "num_microbatches", "message"),
    [
        (2, 1, 3, "1f1b: the program is for 2 pipeline ranks; there are 1"),
        (1, 2, 3, "1f1b: the program is for 1 chunks per rank; there are 2"),
        (1, 1, 4, "1f1b: the program is for 3 microbatches; there are 4"),
    ],
)
def test_ranks_stages_and_microbatches_must_fit_the_program(num_ranks, num_stages, num_microbatches, message):
    program = build_program(build_schedule("1f1b", num_ranks=num_ranks, num_microbatches=3))
    stages = [TracedStage(0, True, True, [], Tracked(), Tracked())] * num_stages
    with pytest.raises(ScheduleError, match=message):
        PipelineRunner(program, stages).run(range(num_microbatches))
