"""The graphed stage with a CPU stand-in for the CUDA graph, and what it requires of a microbatch.

The stand-in records every torch op with its tensors and later repeats the ops on the same tensors, without running our
Python code: a host number or another tensor that a step depends on would keep its recorded value. It does not see our
own kernels, so all ops run on their references.
"""

import dataclasses

import pytest
import torch
from tiny_models import make_model, pipeline_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from train_cases import changed, make_case

from megacoder.core.errors import ConfigError
from megacoder.data.stream import Batch
from megacoder.model import graphed_stage
from megacoder.model.graphed_stage import WARM_UP, GraphedStage
from megacoder.model.partition import ExecutionConfig
from megacoder.model.places import Places
from megacoder.model.stage import Microbatch, Stage
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World
from megacoder.train.engine import Engine
from megacoder.train.layout import LayoutRequest

CPU = torch.device("cpu")
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
"""Ops for whose result the host would wait."""


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def tiny(num_layers=3, **changes):
    return pipeline_config(num_layers, hidden_size=24, intermediate_size=40, head_dim=8, **changes)


def built(config):
    model = make_model(config, seed=1)
    return model, FlatParameters(model.named_parameters(), dtype=torch.float32, device=CPU)


def microbatches(count, *, length=11):
    for seed in range(count):
        tokens = torch.randint(0, 61, (2, length + 1), generator=torch.Generator().manual_seed(seed))
        labels = tokens[:, 1:].clone()
        labels[0, : seed + 1] = IGNORE_INDEX  # another number of labels in each
        yield Microbatch.of(tokens[:, :-1].contiguous(), labels, num_labels=int((labels >= 0).sum()))


def play(monkeypatch, grad):
    """Puts `Recorder` in the place of the graph; the gradients that recording has added are taken back."""
    recorders = []

    def record(step):
        before = grad.clone()
        with Recorder() as recorder:
            step()
        grad.copy_(before)
        recorders.append(recorder)
        return recorder.replay

    monkeypatch.setattr(graphed_stage, "record", record)
    return recorders


@pytest.mark.parametrize("recompute", ["none", "norms", "selective", "full"])
@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qkv_bias": True}, {"qk_norm": True}], ids=str)
def test_replays_equal_the_stages_own_steps(recompute, changes, torch_alone, monkeypatch):
    results = []
    for graphed in (False, True):
        model, flat = built(tiny(**changes))
        stage = Stage.whole(model, recompute=recompute)
        recorders = play(monkeypatch, flat.grad)
        runs = GraphedStage(stage=stage) if graphed else stage
        losses, given = [], list(microbatches(WARM_UP + 4))
        for number, microbatch in enumerate(given):
            loss, saved = runs.forward(None, microbatch)
            assert (saved is None) == graphed
            assert runs.backward(None, saved) is None
            losses.append(loss)
            if number == WARM_UP + 1:  # an update between two replays of one graph
                flat.weight.add_(flat.grad, alpha=-1e-3)
                flat.grad.zero_()
        assert len(recorders) == int(graphed)
        results.append((losses, flat.grad))
        for microbatch, same in zip(given, microbatches(WARM_UP + 4), strict=True):
            assert torch.equal(microbatch.tokens_BS, same.tokens_BS)
            assert torch.equal(microbatch.labels_BS, same.labels_BS)
    (expected, expected_grad), (losses, grad) = results
    assert [loss.num_tokens for loss in losses] == [loss.num_tokens for loss in expected]
    assert torch.equal(torch.stack([loss.total for loss in losses]), torch.stack([loss.total for loss in expected]))
    assert torch.equal(grad, expected_grad)


def test_zero_bubble_backward_halves_run_together(torch_alone, monkeypatch):
    model, flat = built(tiny())
    play(monkeypatch, flat.grad)
    stage = GraphedStage(stage=Stage.whole(model))
    for microbatch in microbatches(WARM_UP + 1):
        _, saved = stage.forward(None, microbatch)
        grad, rest = stage.backward_input(None, saved)
        assert grad is None
        before = flat.grad.clone()
        rest()
        assert torch.equal(flat.grad, before)


def packed(tokens):
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[:, [0, 4]] = True
    return Places.of(tokens.shape, device=CPU, starts_BS=starts)


@pytest.mark.parametrize("num_before", [0, WARM_UP, WARM_UP + 1])
def test_unsupported_settings_of_a_graph_are_refused_before_anything_runs(num_before, torch_alone, monkeypatch):
    model, flat = built(tiny())
    recorders = play(monkeypatch, flat.grad)
    stage = GraphedStage(stage=Stage.whole(model))
    *before, last = microbatches(num_before + 1)
    for microbatch in before:
        stage.forward(None, microbatch)
    grad = flat.grad.clone()
    for changes in ({"num_labels": None}, {"places": None}, {"places": packed(last.tokens_BS)}):
        with pytest.raises(ValueError, match="a CUDA graph needs microbatches with places, counted labels and no"):
            stage.forward(None, dataclasses.replace(last, **changes))
    assert len(recorders) == int(num_before > WARM_UP)
    assert torch.equal(flat.grad, grad)


def test_tokens_of_another_shape_are_refused(torch_alone, monkeypatch):
    model, flat = built(tiny())
    play(monkeypatch, flat.grad)
    stage = GraphedStage(stage=Stage.whole(model))
    for microbatch in microbatches(WARM_UP + 1):
        stage.forward(None, microbatch)
    (other,) = microbatches(1, length=9)
    with pytest.raises(ValueError, match=r"the graph was recorded for \[2, 11\] tokens; this microbatch has \[2, 9\]"):
        stage.forward(None, other)


def engine_of(schedule="1f1b", **execution):
    config = tiny()
    request = LayoutRequest(
        model=config, parallel=ParallelConfig(schedule=schedule), seq_length=11, global_batch_size=8,
        micro_batch_size=2,
    )  # fmt: skip
    layout = request.layout(1)
    return Engine(
        config, layout, Mesh(World(0, 1, 0, CPU, None), layout.dims, sequence_parallel=False),
        execution=ExecutionConfig(**execution), bucket_elements=1 << 20, optimizer=AdamWConfig(), dtype=torch.float32,
        seed=0,
    )  # fmt: skip


def batch(seed):
    tokens = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_engine_updates_match_with_and_without_graph(schedule, torch_alone, monkeypatch):
    monkeypatch.setattr(ExecutionConfig, "check_machine", lambda *_: None)
    curves = []
    for graphed in (False, True):
        engine = engine_of(schedule, cuda_graph=graphed)
        recorders = play(monkeypatch, engine.flat.grad)
        curve = []
        for seed in range(3):
            loss, counted = engine.sum_losses(engine.forward_backward(engine.microbatches(batch(seed), 2)))
            curve.append((loss, engine.update(lr=1e-2, num_tokens=int(counted), max_grad_norm=1.0)))
        curve.append(engine.sum_losses(engine.evaluate(engine.microbatches(batch(3), 2))))
        curves.append(curve)
        assert len(recorders) == int(graphed)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("recompute", ["none", "norms", "selective", "full"])
def test_a_microbatch_of_the_engine_does_not_wait_for_its_device(recompute, torch_alone):
    engine = engine_of(recompute=recompute)
    microbatches = engine.microbatches(batch(0), 2)
    with Recorder() as recorder:
        engine.forward_backward(microbatches)
    assert len(recorder.ops) > 500
    assert not {func._schema.name for func, *_ in recorder.ops} & WAITS
    uncounted = Microbatch.of(microbatches[0].tokens_BS, microbatches[0].labels_BS)
    with Recorder() as recorder:
        Stage.whole(engine.model).forward(None, uncounted)
    assert {func._schema.name for func, *_ in recorder.ops} & WAITS


def test_labels_outside_the_vocabulary_are_found_before_the_device_has_them():
    engine, wrong = engine_of(), batch(0)
    wrong.labels[3, 4] = 61
    with pytest.raises(IndexError, match="label 61 is outside the vocabulary of 61 ids"):
        engine.microbatches(wrong, 2)


def test_runs_without_a_graph_are_refused(tmp_path):
    graph = ExecutionConfig(cuda_graph=True)
    with pytest.raises(ConfigError, match=r'execution.cuda_graph = true needs execution.block = "scheduled"'):
        ExecutionConfig(cuda_graph=True, block="plain")
    with pytest.raises(ConfigError, match=r"execution.cuda_graph = true needs a GPU; this run is on cpu"):
        graph.check_machine("cpu", torch.float32)
    for parallel, shared in (({"tp": 2}, "tp = 2"), ({"cp": 2}, "cp = 2"), ({"pp": 2}, "2 pipeline stages")):
        request = LayoutRequest(
            model=tiny(4), parallel=ParallelConfig(**parallel), seq_length=8, global_batch_size=8,
            micro_batch_size=2, execution=graph,
        )  # fmt: skip
        with pytest.raises(ConfigError, match=rf"execution.cuda_graph = true: .*{shared}.*nearest .* dp=2"):
            request.layout(2)
    case = make_case(tmp_path)
    for masked in ({"stream": {"document_masks": True}}, {"conversations": {"train": (tmp_path / "rows.jsonl",)}}):
        with pytest.raises(ConfigError, match=r"execution.cuda_graph = true with masked documents"):
            changed(case.config("masked"), data=masked, execution=graph)
