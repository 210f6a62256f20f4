"""Buckets communicated during backward and forward give the same bits as buckets communicated afterwards."""

import contextlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_model import tiny
from test_parallel_combined import config_of
from test_parallel_zero import CONFIG, LEARNING_RATES, NUM_SEQUENCES, WORLD_OF_ONE, global_batch
from tiny_models import make_model

from megacoder.model.copies import counted_elsewhere, late_parameters, sum_copied_gradients
from megacoder.model.init import init_weights
from megacoder.model.partition import ExecutionConfig, build_stages, sum_tied_gradients
from megacoder.model.stage import Microbatch, Stage, forward_backward
from megacoder.parallel import buckets
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.pipeline import PipelineRunner
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.schedules.placement import place_evenly
from megacoder.parallel.schedules.program import build_program
from megacoder.parallel.zero import Zero1AdamW

CPU = torch.device("cpu")
WHOLE = 10**9
"""Elements of a bucket that holds everything."""
SCHEDULED, PLAIN = ExecutionConfig(), ExecutionConfig(block="plain")


def optimizer_of(model, group, *, bucket_elements, dtype=torch.float32, num_shards=1, norm_group=None):
    flat = FlatParameters(
        model.named_parameters(), dtype=dtype, device=CPU, num_shards=num_shards,
        late=late_parameters(model), bucket_elements=bucket_elements,
    )  # fmt: skip
    elsewhere = counted_elsewhere(model, flat)
    return Zero1AdamW(flat, group, CONFIG, norm_group=norm_group, counted_elsewhere=elsewhere)


class Replica:
    """A model on one data-parallel rank, whose stage reports unless `overlap` is off."""

    def __init__(self, world, *, overlap, bucket_elements, dtype=torch.float32):
        self.world, self.overlap = world, overlap
        self.model = make_model(tiny(num_hidden_layers=2))
        self.optimizer = optimizer_of(
            self.model, world.group, bucket_elements=bucket_elements, dtype=dtype, num_shards=world.size
        )
        self.stage = Stage.whole(self.model)
        if overlap:
            self.stage = replace(self.stage, events=self.optimizer.traffic)

    def microbatches(self, step):
        share = NUM_SEQUENCES // self.world.size
        parts = (part[self.world.rank * share :][:share].split(1) for part in global_batch(step))
        return list(itertools.starmap(Microbatch, zip(*parts, strict=True)))

    def update(self, step, *, max_grad_norm=100.0):
        """(losses of this rank's microbatches, norm)."""
        microbatches = self.microbatches(step)
        if self.overlap:
            self.optimizer.traffic.begin_step(len(microbatches))
        losses = []
        for microbatch in microbatches:
            loss, saved = self.stage.forward(None, microbatch)
            self.stage.backward(None, saved)
            losses.append(loss.total.item())
        return losses, self.optimizer.step(lr=LEARNING_RATES[step], num_tokens=100, max_grad_norm=max_grad_norm)

    def weights(self):
        self.optimizer.traffic.wait_all()
        return [param.detach().clone() for param in self.model.parameters()]


def train(world, dtype, overlap, bucket_elements, max_grad_norm):
    """(losses, norms, weights, number of buckets) of three updates."""
    replica = Replica(world, overlap=overlap, bucket_elements=bucket_elements, dtype=dtype)
    losses, norms = zip(*(replica.update(step, max_grad_norm=max_grad_norm) for step in range(3)), strict=True)
    return losses, norms, replica.weights(), len(replica.optimizer.flat.buckets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_buckets_and_overlap_change_no_bit(ranks, size, dtype):
    expected = ranks.run(size, train, dtype, False, WHOLE, 100.0)
    assert expected[0][3] == 1
    for overlap, bucket_elements in [(False, 1), (True, 1), (True, 3000), (True, WHOLE)]:
        results = ranks.run(size, train, dtype, overlap, bucket_elements, 100.0)
        for (losses, norms, weights, _), (other_losses, other_norms, other_weights, _) in zip(
            results, expected, strict=True
        ):
            assert losses == other_losses
            assert norms == pytest.approx(other_norms, rel=1e-12)  # squares of other slices are added first
            for weight, other in zip(weights, other_weights, strict=True):
                assert torch.equal(weight, other)
    assert ranks.run(size, train, dtype, True, 3000, 100.0)[0][3] > 3


def test_clipping_is_by_the_norm_of_all_buckets(ranks):
    _, norms, weights, _ = ranks.run(1, train, torch.float32, False, WHOLE, 1e-3)[0]
    assert min(norms) > 1e-2
    for result in ranks.run(3, train, torch.float32, True, 2000, 1e-3):
        assert result[1] == pytest.approx(norms, rel=1e-5)
        for weight, other in zip(result[2], weights, strict=True):
            assert (weight - other).norm() <= 1e-5 * other.norm()


def update_after_a_bad_gradient(world, overlap, value):
    replica = Replica(world, overlap=overlap, bucket_elements=2000)
    replica.update(0)
    weights = replica.weights()
    if world.rank == world.size - 1:
        replica.optimizer.flat.grad[5] = value  # before the backwards add to it, as if the first had made it
    _, norm = replica.update(1)
    unchanged = all(map(torch.equal, weights, replica.weights()))
    return norm, unchanged, replica.optimizer.num_updates, replica.update(1), replica.weights()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(ranks, value):
    for (norm, unchanged, updates, after, weights), other in zip(
        ranks.run(2, update_after_a_bad_gradient, True, value),
        ranks.run(2, update_after_a_bad_gradient, False, value),
        strict=True,
    ):
        assert (norm, unchanged, updates) == (math.inf, True, 1)
        assert after == other[3]
        assert all(map(torch.equal, weights, other[4]))


class Recorder:
    """Stage's reports and the traffic's collectives, in the order in which they happen."""

    def __init__(self, optimizer, model):
        self.log, self.traffic = [], optimizer.traffic
        self.units = {module: name for name, module in model.named_modules()}
        self.names = {bucket.start: bucket.slots[0].name for bucket in optimizer.flat.buckets}

    def entering(self, unit):
        self.log.append(("entering", self.units[unit]))
        self.traffic.entering(unit)

    def finished(self, unit):
        self.log.append(("finished", self.units[unit]))
        self.traffic.finished(unit)

    @contextlib.contextmanager
    def recording(self):
        """Collectives are noted when they start, gathers when they are waited for too."""
        with pytest.MonkeyPatch.context() as patch:
            for name, kind in [("start_reduce_scatter_sum", "reduce"), ("start_all_gather", "gather")]:
                patch.setattr(buckets, name, self._noting(getattr(buckets, name), kind))
            yield

    def _noting(self, start, kind):
        def noting(*tensors_and_group):
            name = self.names[min(tensor.storage_offset() for tensor in tensors_and_group[:2])]
            self.log.append((kind, name))
            return Noted(start(*tensors_and_group), lambda: self.log.append((f"{kind} over", name)))

        return noting


class Noted:
    def __init__(self, pending, note):
        self.pending, self.note = pending, note

    def wait(self):
        self.note()
        return self.pending.wait()


def traced(world, tied):
    """(log of a step, what it says up to the last report, log of the next step's first forward, names by unit)."""
    replica = Replica(world, overlap=True, bucket_elements=1)
    if tied:
        replica.model = make_model(tiny(num_hidden_layers=2, tie_word_embeddings=True))
        replica.optimizer = optimizer_of(replica.model, world.group, bucket_elements=1, num_shards=world.size)
    recorder = Recorder(replica.optimizer, replica.model)
    replica.stage = replace(Stage.whole(replica.model), events=recorder)
    with recorder.recording():
        replica.update(0)
        step, recorder.log = recorder.log, []
        replica.stage.evaluate(None, replica.microbatches(1)[0])
    return step, recorder.log, [name for name, _ in replica.model.named_parameters()]


@pytest.mark.parametrize("tied", [False, True])
def test_reduces_start_within_the_last_backward_and_gathers_end_within_the_next_forward(ranks, tied):
    (step, forward, names), other = ranks.run(2, traced, tied)
    assert (step, forward, names) == other
    units = ["embed_tokens", "layers.0", "layers.1", "norm"] + ([] if tied else ["lm_head"])
    of_unit = {unit: [name for name in names if name.startswith(unit + ".")] for unit in units}

    head = ("entering", "embed_tokens" if tied else "lm_head")
    last_forward = max(index for index, entry in enumerate(step) if entry == head)
    first_forwards, last_backward = step[: last_forward + 1], step[last_forward + 1 :]
    assert not {"reduce", "gather"} & {kind for kind, _ in first_forwards}

    expected = []
    for unit in [*(["norm"] if tied else ["norm", "lm_head"]), "layers.1", "layers.0", "embed_tokens"]:
        expected.append(("finished", unit))
        expected += [("reduce", name) for name in of_unit[unit]]
    assert last_backward[: len(expected)] == expected
    rest = last_backward[len(expected) :]
    assert rest[: len(names)] == [("reduce over", name) for kind, name in expected if kind == "reduce"]
    assert rest[len(names) :] == [("gather", name) for name in names]  # and none is waited for

    expected = []
    for unit in [*units[:4], "lm_head"]:
        expected.append(("entering", "embed_tokens" if tied and unit == "lm_head" else unit))
        expected += [("gather over", name) for name in of_unit.get(unit, [])]
    assert forward == expected


def layout_run(world, dims, name, tied, sequence_parallel, overlap, bucket_elements, execution=SCHEDULED):
    """(norms, weights after two updates, late names, buckets reduced before the sums over copies, early buckets)."""
    mesh = Mesh(world, dims, sequence_parallel=sequence_parallel)
    schedule = build_schedule(name, num_ranks=dims.pp, num_microbatches=3)
    num_stages = schedule.stage_map.num_stages
    stages = build_stages(
        config_of(num_stages, tied), mesh.tp, cp=mesh.cp,
        placement=place_evenly(num_stages, num_stages), held=schedule.stage_map.stages[mesh.place.pp],
        execution=execution,
    )  # fmt: skip
    model = stages[0].model
    init_weights(model, seed=3)
    optimizer = optimizer_of(
        model, mesh.group("dp", "cp"), bucket_elements=bucket_elements, num_shards=dims.dp,
        norm_group=world.group,
    )  # fmt: skip
    recorder = Recorder(optimizer, model)
    if overlap:
        stages = [replace(stage, events=recorder) for stage in stages]
    runner = PipelineRunner(build_program(schedule), stages, mesh.group("pp"))
    norms, early = [], set()
    for step in range(2):
        tokens = torch.randint(0, 61, (dims.dp, 3, 2, 9), generator=torch.Generator().manual_seed(step))
        microbatches = [
            Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens[mesh.place.dp]
        ]
        recorder.log.clear()
        with recorder.recording():
            if overlap:
                optimizer.traffic.begin_step(len(microbatches))
            runner.run(microbatches)
            early = {bucket for kind, bucket in recorder.log if kind == "reduce"}
        sum_copied_gradients(model)
        sum_tied_gradients(model, stage_map=schedule.stage_map, group=mesh.group("pp"))
        norms.append(optimizer.step(lr=1e-2, num_tokens=96, max_grad_norm=100.0))
    optimizer.traffic.wait_all()
    late = {slot.name for bucket in optimizer.flat.buckets if bucket.late for slot in bucket.slots}
    expected_early = {bucket.slots[0].name for bucket in optimizer.flat.buckets if not bucket.late}
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return norms, weights, late, early, expected_early


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"])
def test_every_schedule_counts_right(ranks, name, tied):
    dims = ParallelDims(pp=2, dp=2)
    expected = ranks.run(4, layout_run, dims, name, tied, False, False, WHOLE)
    for bucket_elements in (1, 700):
        results = ranks.run(4, layout_run, dims, name, tied, False, True, bucket_elements)
        for (norms, weights, late, early, expected_early), other in zip(results, expected, strict=True):
            assert norms == pytest.approx(other[0], rel=1e-12)
            assert early == expected_early
            assert late <= {"embed_tokens.weight"}
            for name_, weight in weights.items():
                assert torch.equal(weight, other[1][name_]), name_
        v_shaped = name in ("zbv", "dualpipev")  # where one rank has both ends
        assert any(late for _, _, late, _, _ in results) == (tied and not v_shaped)


@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_plain_stages_report_too(ranks, name):
    arguments = (ParallelDims(pp=2, dp=2), name, False, False)
    expected = ranks.run(4, layout_run, *arguments, False, WHOLE, PLAIN)
    for result, other in zip(ranks.run(4, layout_run, *arguments, True, 700, PLAIN), expected, strict=True):
        _, weights, late, early, expected_early = result
        assert (late, early) == (set(), expected_early)
        for weight_name, weight in weights.items():
            assert torch.equal(weight, other[1][weight_name]), weight_name


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all tokens", "sequence parallel"])
def test_only_gradients_summed_over_copies_wait(ranks, sequence_parallel):
    dims = ParallelDims(tp=2, dp=2)
    arguments = (dims, "1f1b", False, sequence_parallel)
    expected = ranks.run(4, layout_run, *arguments, False, WHOLE)
    for result, other in zip(ranks.run(4, layout_run, *arguments, True, 700), expected, strict=True):
        norms, weights, late, early, expected_early = result
        assert norms == pytest.approx(other[0], rel=1e-12)
        assert early == expected_early
        ends = ("qkv_proj.weight", "norm.weight") if sequence_parallel else ("qkv_proj.weight",)  # one key-value head
        assert late == {name for name in weights if name.endswith(ends)}
        for name, weight in weights.items():
            assert torch.equal(weight, other[1][name]), name


def gradients_then_step(world, ask):
    """(owned slices of the gradient sums if asked for, weights after the step)."""
    replica = Replica(world, overlap=True, bucket_elements=2000)
    step, gradients = replica.optimizer.step, []

    def asking(**arguments):
        if ask:
            gradients.extend([replica.optimizer.gradients(), replica.optimizer.gradients()])
        return step(**arguments)

    replica.optimizer.step = asking
    replica.update(0)
    owned = [(part.slot.name, part.start, part.offset, part.stop - part.start) for part in replica.optimizer.owned]
    return gradients, owned, replica.weights()


def test_gradients_may_be_read_before_the_step(ranks):
    whole = Replica(WORLD_OF_ONE, overlap=False, bucket_elements=WHOLE)
    for microbatch in whole.microbatches(0):
        forward_backward(whole.model, microbatch.tokens_BS, microbatch.labels_BS)
    expected = {name: param.grad.flatten() for name, param in whole.model.named_parameters()}
    for (gradients, owned, weights), (_, _, others) in zip(
        ranks.run(2, gradients_then_step, True), ranks.run(2, gradients_then_step, False), strict=True
    ):
        assert torch.equal(*gradients)
        for name, start, offset, length in owned:
            part = expected[name][start : start + length]
            assert (gradients[0][offset : offset + length] - part).norm() <= 1e-5 * expected[name].norm(), name
        assert all(map(torch.equal, weights, others))


def silent_stage(world):
    """Weights straight after a step with overlap whose stage reported nothing."""
    replica = Replica(world, overlap=False, bucket_elements=1000)
    replica.optimizer.traffic.begin_step(1)
    microbatch = replica.microbatches(0)[0]
    forward_backward(replica.model, microbatch.tokens_BS, microbatch.labels_BS)
    replica.optimizer.step(lr=1e-3, num_tokens=10, max_grad_norm=1.0)
    weights = [param.detach().clone() for param in replica.model.parameters()]
    return all(map(torch.equal, weights, replica.weights())), weights


def test_all_weights_are_gathered_after_a_step_without_stage_reports(ranks):
    (arrived, weights), (other_arrived, others) = ranks.run(2, silent_stage)
    assert arrived
    assert other_arrived
    assert all(map(torch.equal, weights, others))


def one_too_many(world):
    replica = Replica(world, overlap=True, bucket_elements=1000)
    replica.optimizer.traffic.begin_step(1)
    microbatch = replica.microbatches(0)[0]
    replica.stage.backward(None, replica.stage.forward(None, microbatch)[1])
    again = replica.stage.forward(None, microbatch)[1]
    with pytest.raises(RuntimeError, match="RMSNorm: finished by more microbatches than begin_step announced"):
        replica.stage.backward(None, again)
    list(replica.optimizer.traffic.reduced())  # a rank must not leave while others still wait for it


def test_a_gradient_that_comes_after_its_bucket_left_is_refused(ranks):
    ranks.run(2, one_too_many)


def test_buckets_for_another_number_of_ranks_are_refused():
    flat = FlatParameters(make_model(tiny()).named_parameters(), dtype=torch.float32, device=CPU, num_shards=2)
    with pytest.raises(ValueError, match="parameters are cut for 2 data-parallel ranks; there are 1"):
        Zero1AdamW(flat, None, CONFIG)
