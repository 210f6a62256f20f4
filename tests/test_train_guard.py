"""Skipped updates, drifting replicas, failing saves: noticed on every rank, then handled as configured."""

import dataclasses
import math
import os
import signal
import stat
import sys
import threading
import tomllib
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import no_space, state_of
from train_cases import ALONE, leave, make_case, run_to, scalars

from megacoder.checkpoint import writer as writer_module
from megacoder.checkpoint.folders import step_folders
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.checkpoint.writer import CheckpointConfig
from megacoder.core.config import from_dict, to_toml
from megacoder.core.errors import AlikeOnAllRanks, CheckpointError, ConfigError
from megacoder.model.transformer import Transformer
from megacoder.ops import adamw
from megacoder.ops.adamw import AdamWConfig
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.journal import CHECKPOINT
from megacoder.parallel.tensor import TensorParallel
from megacoder.parallel.world import World
from megacoder.train.config import RunConfig
from megacoder.train.guard import Guard, GuardConfig, RunStopped
from megacoder.train.loop import Trainer
from megacoder.train.metrics_log import MetricsLog, read_metrics
from megacoder.train.replicas import _digests, digest


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("guard"))


# The guard alone


def noted(guard, count, loss=2.0, grad_norm=0.5):
    for _ in range(count):
        assert guard.note(loss=loss, grad_norm=grad_norm, skipped=False, num_tokens=1) is None


def test_limits_are_multiples_of_medians_once_there_is_a_history():
    guard = Guard(GuardConfig(loss_spike=3.0, grad_norm_spike=10.0, window=8), max_grad_norm=0.0)
    noted(guard, 1, loss=100.0, grad_norm=50.0)
    assert (guard.limits().loss, guard.limits().grad_norm) == (sys.float_info.max, sys.float_info.max)
    noted(guard, 2)
    assert (guard.limits().loss, guard.limits().grad_norm) == (6.0, 5.0)
    noted(guard, 8, loss=1.0, grad_norm=0.1)
    assert (guard.limits().loss, guard.limits().grad_norm) == (3.0, 1.0), "what is older than the window is forgotten"
    off = Guard(GuardConfig(loss_spike=0, grad_norm_spike=0, window=8), max_grad_norm=0.0)
    noted(off, 8)
    assert (off.limits().loss, off.limits().grad_norm) == (sys.float_info.max, sys.float_info.max)


def test_unclipped_norms_and_small_losses_are_no_spikes():
    """As where a few answers are learnt by heart, and medians vanish."""
    guard = Guard(GuardConfig(loss_spike=3.0, grad_norm_spike=10.0, window=8), max_grad_norm=1.0)
    noted(guard, 8, loss=0.002, grad_norm=0.01)
    assert (guard.limits().loss, guard.limits().grad_norm) == (1.0, 1.0)
    noted(guard, 8, loss=0.5, grad_norm=0.3)
    assert (guard.limits().loss, guard.limits().grad_norm) == (1.5, 3.0)
    unclipped = Guard(GuardConfig(window=8), max_grad_norm=math.inf)
    noted(unclipped, 8, grad_norm=0.01)
    assert unclipped.limits().grad_norm == pytest.approx(0.1), "there is nothing else to hold it back"


def test_a_runs_guard_knows_what_is_clipped(case):
    trainer = Trainer(case.config("clipped", max_grad_norm=0.7, guard=GuardConfig(window=4)), ALONE)
    noted(trainer.guard, 4, grad_norm=0.01)
    assert trainer.guard.limits().grad_norm == 0.7
    leave(trainer, saving=False)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 0.5, "the loss is nan"),
        (math.inf, 0.5, "the loss is inf"),
        (2.0, math.inf, "the gradient is not finite"),
        (7.0, 0.5, r"the loss 7 is above guard.loss_spike = 3 x its median 2"),
        (2.0, 5.5, r"the gradient norm 5.5 is above guard.grad_norm_spike = 10 x its median 0.5"),
    ],
)
def test_the_reason_is_given_and_too_many_in_a_row_end_the_run(loss, grad_norm, reason):
    guard = Guard(GuardConfig(window=4, max_skipped=3), max_grad_norm=0.0)
    noted(guard, 4)
    assert guard.note(loss=loss, grad_norm=grad_norm, skipped=True, num_tokens=1) == reason
    guard.note(loss=loss, grad_norm=grad_norm, skipped=True, num_tokens=1)
    noted(guard, 1)  # which ends the row
    for _ in range(2):
        guard.note(loss=loss, grad_norm=grad_norm, skipped=True, num_tokens=1)
    with pytest.raises(RunStopped, match=f"3 updates in a row were skipped, the last because {reason}") as raised:
        guard.note(loss=loss, grad_norm=grad_norm, skipped=True, num_tokens=1)
    assert "megacoder data show" in str(raised.value), "how to look at the data"
    assert guard.num_skipped == 5


def test_a_guard_resumes_from_its_state():
    guard = Guard(GuardConfig(window=4), max_grad_norm=0.0)
    noted(guard, 3)
    guard.note(loss=9.0, grad_norm=1.0, skipped=True, num_tokens=1)
    other = Guard(guard.config, max_grad_norm=0.0)
    other.load_state_dict(guard.state_dict())
    assert (other.limits(), other.state_dict()) == (guard.limits(), guard.state_dict())
    for resumed in (guard, other):
        noted(resumed, 3, loss=1.0, grad_norm=0.1)
    assert other.state_dict() == guard.state_dict(), "what is older than the window is forgotten after a resume, too"


def test_a_disabled_guard_is_disabled_in_the_written_config(case):
    config = case.config("off", guard=GuardConfig(loss_spike=0, grad_norm_spike=0, compare_replicas_every=0))
    assert from_dict(RunConfig, tomllib.loads(to_toml(config)), where="run.toml") == config


@pytest.mark.parametrize("name", ["USR1", "SIGNAL", "SIGKILL", "SIGUSR9"])
def test_signals_that_cannot_be_handled_are_refused(case, name):
    with pytest.raises(ConfigError, match=f"stop_signals: '{name}' is not a signal"):
        case.config("x", stop_signals=(name,))


# Updates left out


def spoil(trainer, step, kind):
    """From now on the loss or gradient of `step` is as `kind` says, on the last rank alone."""
    engine, is_last = trainer.engine, trainer.world.rank == trainer.world.size - 1
    forward_backward = engine.forward_backward

    def spoilt(microbatches):
        spoils = trainer.step + 1 == step and is_last
        if spoils and kind in ("norm", "nan gradient"):  # before backwards add to it, as if the first had made it
            engine.flat.grad[3] = 1e9 if kind == "norm" else math.nan
        part = forward_backward(microbatches)
        if spoils and kind in ("loss", "nan"):
            part = dataclasses.replace(part, total=part.total + 1e6 if kind == "loss" else part.total * math.nan)
        return part

    engine.forward_backward = spoilt


def run_spoilt(world, config, step, kind):
    trainer = Trainer(config, world)
    spoil(trainer, step, kind)
    before = []
    update = trainer.update

    def watched():
        weights = trainer.engine.flat.weight.clone()
        result = update()
        trainer.engine.optimizer.traffic.wait_all()
        before.append((result.skipped, torch.equal(weights, trainer.engine.flat.weight)))
        return result

    trainer.update = watched
    trainer.run()
    return before, trainer.engine.optimizer.num_updates


@pytest.mark.parametrize("kind", ["loss", "nan", "norm", "nan gradient"])
def test_an_update_is_skipped_on_every_rank(ranks, case, kind):
    config = case.config(kind, guard=GuardConfig(window=4), checkpoint_every=8, eval_every=8)
    for seen, num_updates in ranks.run(2, run_spoilt, config, 5, kind):
        assert seen == [(step == 5, step == 5) for step in range(1, 9)], "(left out, weights as they were) by step"
        assert num_updates == 7
    assert CheckpointReader(config.output).state["num_updates"] == 7, "which the bias corrections of a resumed run need"
    rows = read_metrics(config.output / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (rows[4]["loss"] is None) == (kind == "nan")
    assert (rows[4]["grad_norm"] is None) == (kind == "nan gradient")


def test_the_updates_after_a_skipped_one_have_the_rates_of_their_steps(case):
    """As logged; a schedule that counted updates would lag, and end the run above its last rate."""
    trainer, rates = Trainer(case.config("rates", checkpoint_every=8, eval_every=8), ALONE), []
    spoil(trainer, 1, "nan")
    step = trainer.engine.optimizer.step
    trainer.engine.optimizer.step = lambda **settings: (rates.append(settings["lr"]), step(**settings))[1]
    trainer.run()
    assert trainer.guard.num_skipped == 1
    assert rates == [trainer.config.learning_rate(number) for number in range(1, 9)]
    assert rates == [row["lr"] for row in read_metrics(trainer.config.output / "metrics.jsonl")]


def test_a_resumed_run_skips_the_updates_of_the_uninterrupted_one(case):
    """The spike comes right after the resume, when only the checkpoint knows what is usual."""
    config = case.config("spike", guard=GuardConfig(window=12), steps=5, checkpoint_every=3, eval_every=8)
    whole = Trainer(config, ALONE)
    spoil(whole, 4, "norm")
    whole.run()
    resumed = dataclasses.replace(config, output=case.folder / "spike-resumed")
    run_to(ALONE, resumed, 3)
    second = Trainer(resumed, ALONE)
    spoil(second, 4, "norm")
    second.run()
    assert second.guard.state_dict() == whole.guard.state_dict()
    assert second.guard.num_skipped == 1
    expected = state_of(config.output)
    for key, tensor in state_of(resumed.output).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    ("squares", "limit", "norm", "made"),
    [
        (16.0, 2.0, 2.0, True),
        (16.0, 1.9, 2.0, False),
        (16.0, -1.0, 2.0, False),
        (16.0, sys.float_info.max, 2.0, True),
        (math.inf, 1e300, math.inf, False),
        (math.nan, 1e300, math.inf, False),
    ],
)
def test_update_scalars_passes_infinite_squares_to_the_kernel_to_skip_an_update(
    monkeypatch, squares, limit, norm, made
):
    """Only what the kernel receives is checked here; what it does with that, in test_cuda_kernels.py."""
    received = []
    monkeypatch.setattr(adamw.cuda, "adamw_scalars", lambda *tensors, **settings: received.append((tensors, settings)))
    config = AdamWConfig(beta1=0.8, beta2=0.9)
    scalars, found = adamw.update_scalars(
        torch.tensor(squares, dtype=torch.float64), config=config, lr=0.25, num_updates=3, num_tokens=2,
        max_grad_norm=1.0, skip_above=limit,
    )  # fmt: skip
    [(tensors, settings)] = received
    assert [tensor.item() for tensor in tensors] == [squares if made else math.inf, 2.0, 0.25, 3]
    assert [tensor.dtype for tensor in tensors] == [torch.float64, torch.float64, torch.float32, torch.int64]
    assert (settings["max_grad_norm"], settings["beta1"], settings["beta2"]) == (1.0, 0.8, 0.9)
    assert settings["scalars"] is scalars
    assert settings["norm"] is not found, "the kernel's own norm is infinite where the update is skipped"
    assert found.item() == norm


def lose_from(trainer, step):
    """From `step` on the loss is no number."""
    forward_backward = trainer.engine.forward_backward

    def spoilt(microbatches):
        part = forward_backward(microbatches)
        return dataclasses.replace(part, total=part.total * math.nan) if trainer.step + 1 >= step else part

    trainer.engine.forward_backward = spoilt


def test_a_run_that_the_guard_ended_is_not_started_again(ranks, case, capfd):
    """Every update from the third on is left out; the checkpoint of step 4 would come to the same."""
    config = case.config("ended", guard=GuardConfig(max_skipped=4), checkpoint_every=4, eval_every=8)
    said = ranks.run(2, run_into_the_guard, config)
    assert [line.partition(";")[0] for line in said] == [
        "4 updates in a row were skipped, the last because the loss is nan"
    ] * 2
    assert CheckpointReader(config.output).step == 4, "which was whole before the end"
    mark = config.output / "stopped"
    assert mark.read_text() == f"step 6: {said[0]}\n"
    with pytest.raises(
        AlikeOnAllRanks, match=r"stopped: the run was stopped at step 6: 4 updates .* remove that file$"
    ):
        Trainer(config, ALONE)
    mark.unlink()
    trainer = Trainer(dataclasses.replace(config, guard=GuardConfig(max_skipped=20)), ALONE)
    assert trainer.step == 4
    trainer.run()
    assert CheckpointReader(config.output).step == 8


def run_into_the_guard(world, config):
    trainer = Trainer(config, world)
    lose_from(trainer, 3)
    with pytest.raises(RunStopped) as stopped:
        trainer.run()
    return str(stopped.value)


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_in_flight_is_finished_when_the_guard_ends_the_run(case, monkeypatch, capfd, fails):
    """The thread that saves step 2 goes on once the run has come to its end in step 4."""
    config = case.config(f"flight-{fails}", guard=GuardConfig(max_skipped=2), checkpoint_every=2, eval_every=8)
    ended = threading.Event()
    write = writer_module.write_part

    def late(*args, **kwargs):
        assert ended.wait(60)
        return no_space() if fails else write(*args, **kwargs)

    monkeypatch.setattr(writer_module, "write_part", late)
    trainer = Trainer(config, ALONE)
    note = trainer.guard.note

    def noted(**seen):
        if trainer.step == 3:
            ended.set()
        return note(**seen)

    monkeypatch.setattr(trainer.guard, "note", noted)
    checkpoints, activities = trainer.folder.checkpoints, []
    conclude = checkpoints.conclude

    def concluded():
        activities.append(trainer.world.journal.activity)
        conclude()

    monkeypatch.setattr(checkpoints, "conclude", concluded)
    lose_from(trainer, 3)
    with pytest.raises(RunStopped, match="2 updates in a row"):
        trainer.run()
    assert activities == [CHECKPOINT], "else a GPU's watchdog takes a long save for a hang"
    said = capfd.readouterr().err
    assert "finishing the checkpoint of step 2, which was being written" in said
    assert ("saving step 2 failed" in said) == fails
    assert [step for step, _ in step_folders(config.output / "checkpoints")] == ([] if fails else [2])
    assert not list((config.output / "checkpoints").glob("*.tmp-*"))


# Replicas


def test_a_digest_sees_any_one_element():
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
        whole = digest(values).item()
        assert digest(values.clone()).item() == whole
        for index in (0, 150, 299):
            other = values.clone()
            other.view(torch.int8)[index * dtype.itemsize] ^= 1  # the lowest bit
            assert digest(other).item() != whole
        swapped = values.clone()
        swapped[[0, 1]] = values[[1, 0]]
        assert digest(swapped).item() != whole


@pytest.mark.parametrize(
    ("device", "dims", "alike"),
    [
        ("cpu", ParallelDims(tp=2, dp=4), True),
        ("cuda", ParallelDims(tp=2, dp=2), True),
        ("cuda", ParallelDims(tp=2, dp=4), False),
        ("cuda", ParallelDims(tp=2, dp=2, cp=2), False),
    ],
)
def test_replicas_are_compared_where_they_sum_in_one_order(case, device, dims, alike):
    names = []
    for rank in (0, 1, dims.world_size - 2):
        place, world = dims.coordinates(rank), World(rank, dims.world_size, 0, torch.device(device), None)
        model = Transformer(case.config("x").model, TensorParallel(rank=place.tp, size=2))
        mesh = SimpleNamespace(world=world, dims=dims, place=place)
        names.append({name for name, _ in _digests(SimpleNamespace(model=model, mesh=mesh))})
    first, copy, replica = names
    assert first == replica
    assert any(name.startswith("model.norm.weight") for name in first & copy) == alike


def run_drifting(world, config, rank, name, at=4, asks_to_stop=False):
    """One bit of a weight flips on one rank as step `at` begins; what each rank says, and the step it came to.

    `asks_to_stop`: that step answers a signal which has reached the same rank.
    """
    trainer = Trainer(config, world)
    engine = trainer.engine
    forward_backward = engine.forward_backward

    def drifting(microbatches):
        if asks_to_stop and trainer.step + 1 == at and world.rank == rank:
            trainer._ask_to_stop(signal.SIGTERM, None)
        if trainer.step + 1 == at and world.rank == rank:
            engine.optimizer.traffic.wait_all()
            param = dict(engine.model.named_parameters())[name]
            param.data.view(-1)[7:8].view(torch.int32).bitwise_xor_(1)
        return forward_backward(microbatches)

    engine.forward_backward = drifting
    try:
        trainer.run()
    except AlikeOnAllRanks as error:
        return str(error), trainer.step
    finally:
        trainer.folder._held.close()
        trainer.batches.close()
    return None, trainer.step


@pytest.mark.parametrize(
    ("size", "parallel", "rank", "name", "line"),
    [
        (4, ParallelConfig(), 2, "layers.1.mlp.down_proj.weight",
         "model.layers.1.mlp.down_proj.weight of rank 2 differs from that of ranks 0, 1, 3"),
        (4, ParallelConfig(tp=2), 3, "norm.weight", "model.norm.weight of rank 3 differs from that of ranks 0, 1, 2"),
        (4, ParallelConfig(tp=2), 1, "layers.0.mlp.down_proj.weight",
         "model.layers.0.mlp.down_proj.weight, part at [0, 24] of rank 3 differs from that of rank 1"),
    ],
)  # fmt: skip
def test_a_weight_that_drifts_is_named_with_its_rank(ranks, case, size, parallel, rank, name, line):
    config = case.config(
        f"drift-{rank}", parallel=parallel, guard=GuardConfig(compare_replicas_every=2), eval_every=8,
    )  # fmt: skip
    for said, step in ranks.run(size, run_drifting, config, rank, name):
        assert said is not None
        assert said.startswith(f"step 4: {line}"), said
        assert "resumes from the newest checkpoint, taken while replicas were equal (last in step 3)" in said
        assert step == 3, "the update is not made"


def test_equal_replicas_are_let_pass(ranks, case):
    config = case.config(
        "equal", parallel=ParallelConfig(tp=2, pp=2), steps=4, eval_every=8,
        guard=GuardConfig(compare_replicas_every=1),
        model={"tie_word_embeddings": True},
    )  # fmt: skip
    assert ranks.run(8, run_drifting, config, None, None) == [(None, 4)] * 8


@pytest.mark.parametrize(("at", "asks_to_stop"), [(6, False), (5, True), (8, False)])
def test_drifted_replicas_are_not_saved(ranks, case, at, asks_to_stop):
    """Neither at a checkpoint's time nor after a signal nor at the end, however seldom replicas are compared."""
    config = case.config(
        f"unsaved-{at}", guard=GuardConfig(compare_replicas_every=1000), eval_every=8, checkpoint_every=3,
    )  # fmt: skip
    for said, step in ranks.run(2, run_drifting, config, 1, "norm.weight", at, asks_to_stop):
        assert said is not None
        assert said.startswith(f"step {at}: model.norm.weight of rank 1 differs from that of rank 0")
        assert step == at - 1
    newest = 3 * ((at - 1) // 3)
    assert f"(last in step {newest})" in said
    assert CheckpointReader(config.output).step == newest
    assert not (config.output / "stopped").exists()
    trainer = Trainer(config, ALONE)  # a restart may go on
    assert (trainer.step, trainer.replicas._last_equal) == (newest, newest)
    trainer.folder._held.close()
    trainer.batches.close()


# Full disks


@pytest.fixture
def full_disk(monkeypatch):
    """A function that fills the disk, and one that frees it: for files alone."""
    write, is_full = os.write, [False]

    def limited(descriptor, data):
        return no_space() if is_full[0] and stat.S_ISREG(os.fstat(descriptor).st_mode) else write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    return lambda: is_full.__setitem__(0, True), lambda: is_full.__setitem__(0, False)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_ends_the_run_or_not_by_config(case, full_disk, asynchronous, capfd):
    fill, free = full_disk
    for on_failure in ("stop", "go_on"):
        config = case.config(
            f"full-{on_failure}-{asynchronous}", eval_every=8, checkpoint_every=2,
            checkpoint=CheckpointConfig(on_failure=on_failure, asynchronous=asynchronous),
        )  # fmt: skip
        trainer = Trainer(config, ALONE)
        update = trainer.update

        def during(trainer=trainer, update=update, on_failure=on_failure):
            if trainer.step == 3:
                trainer.folder.checkpoints._join(on_failure)
                fill()
            elif trainer.step == 6:
                trainer.folder.checkpoints._join(on_failure)
                free()
            return update()

        trainer.update = during
        if on_failure == "stop":
            with pytest.raises(CheckpointError, match=r"saving step 4 failed: .*No space left on device"):
                trainer.run()
            assert CheckpointReader(config.output / "checkpoints").step == 2
            trainer.folder._held.close()
            free()
            continue
        trainer.run()
        said = capfd.readouterr().err
        assert [f"saving step {step} failed" in said for step in (2, 4, 6, 8)] == [False, True, True, False]
        assert CheckpointReader(config.output / "checkpoints").step == 8
        assert sorted(p.name for p in (config.output / "checkpoints").iterdir()) == [
            "latest", "step-00000002", "step-00000008",
        ]  # fmt: skip


def test_a_run_must_end_with_its_last_checkpoint(case, full_disk):
    fill, _ = full_disk
    config = case.config("full-at-the-end", eval_every=8, checkpoint=CheckpointConfig(on_failure="go_on"))
    trainer = Trainer(config, ALONE)
    update = trainer.update
    trainer.update = lambda: (fill() if trainer.step == 7 else None, update())[1]
    with pytest.raises(CheckpointError, match="saving step 8 failed"):
        trainer.run()
    assert CheckpointReader(config.output / "checkpoints").step == 6


def test_metrics_wait_for_room(tmp_path, capsys):
    log = MetricsLog(tmp_path, resume_step=0)
    log.write(1, {"loss": 1.0})

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:5])  # a disk takes what still fits
            no_space()

        def truncate(self, size):
            self.file.truncate(size)

    files = [(appender, appender._file) for appender in (log._lines, log._events._file)]
    for appender, file in files:
        appender._file = Full(file)
    log.write(2, {"loss": 2.0})
    log.write(3, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert capsys.readouterr().err.count("metrics.jsonl: No space left on device; entries are held back") == 1
    for appender, file in files:
        appender._file = file
    log.write(4, {"loss": math.inf})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, None)]
    assert [step for step, _ in scalars(tmp_path, "loss")] == [1, 2, 3, 4]
