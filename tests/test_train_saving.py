"""When a run saves: by steps, by the first rank's clock, and at the milestones that rotation keeps."""

import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch
from train_cases import make_case, stop_in

from megacoder.checkpoint.folders import step_folders
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.checkpoint.writer import CheckpointConfig, CheckpointWriter
from megacoder.core.errors import ConfigError
from megacoder.parallel.world import World
from megacoder.train import loop
from megacoder.train.loop import Interrupted, Trainer, train
from megacoder.train.metrics_log import HELD_OUT_LOSS, METRICS, read_metrics
from megacoder.train.validation import HeldOut

ALONE = World(0, 1, 0, torch.device("cpu"), None)
AT_ONCE = CheckpointConfig(asynchronous=False)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("saving"))


@pytest.fixture(scope="module")
def alone(case):
    """The run that saves by steps alone."""
    config = case.config("alone")
    train(config)
    return config.output


def saved_steps(world, config, *, minutes_per_step=1.0):
    """The steps at which a rank saves in a run whose steps take so long by the first rank's clock."""
    trainer, saved = Trainer(config, world), []
    step_minutes = minutes_per_step if world.is_first else 1e6
    real, save = loop.time, trainer.folder.save
    trainer._last_saved = 0.0
    trainer.folder.save = lambda step, *state, **more: (saved.append(step), save(step, *state, **more))[1]
    loop.time = SimpleNamespace(monotonic=lambda: 60 * step_minutes * trainer.step, perf_counter=time.perf_counter)
    try:
        trainer.run()
    finally:
        loop.time = real
    return saved


@pytest.mark.parametrize(
    ("every", "minutes", "keep_every", "saved"),
    [
        (100, None, None, [8]),
        (3, None, None, [3, 6, 8]),
        (100, 2.0, None, [3, 6, 8]),  # steps 1 and 2 had taken two minutes when the third was asked
        (2, 3.0, None, [2, 4, 6, 8]),  # any save starts the time anew
        (5, 3.0, 5, [4, 5, 8]),
        (4, None, 6, [4, 6, 8]),
    ],
)
def test_a_run_saves_by_steps_by_time_and_at_milestones(case, every, minutes, keep_every, saved):
    config = case.config(
        f"when-{every}-{minutes}-{keep_every}", checkpoint_every=every, checkpoint_minutes=minutes,
        checkpoint=dataclasses.replace(AT_ONCE, keep_every=keep_every, keep_last=1),
    )  # fmt: skip
    assert saved_steps(ALONE, config) == saved
    kept = [step for step, _ in step_folders(config.output / "checkpoints")]
    assert kept == [step for step in saved if step == 8 or (keep_every and step % keep_every == 0)]


def test_milestones_closer_together_than_checkpoints_are_refused(case):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_every = 3 is below checkpoint_every = 100: "):
        case.config("too-many", checkpoint_every=100, checkpoint=CheckpointConfig(keep_every=3))


def test_the_first_ranks_clock_decides_and_changes_nothing_that_is_trained(case, alone, ranks):
    config = case.config("by-time", checkpoint_every=100, checkpoint_minutes=2.0, checkpoint=AT_ONCE)
    assert ranks.run(2, saved_steps, config) == [[3, 6, 8]] * 2
    by_steps = case.config("by-steps", checkpoint=AT_ONCE)
    assert ranks.run(2, saved_steps, by_steps) == [[3, 6, 8]] * 2
    ours, expected = (CheckpointReader(output / "checkpoints") for output in (config.output, by_steps.output))
    for kind, name in expected.tensors():
        assert torch.equal(ours.read_tensor(name, kind), expected.read_tensor(name, kind)), (kind, name)
    curves = [
        [(row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (config.output, by_steps.output, alone)
    ]
    assert curves[0] == curves[1]
    assert curves[0] == [pytest.approx(row, rel=2e-5) for row in curves[2]]


def test_time_does_not_wait_for_a_save_that_is_still_being_written(case, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "is_writing", True)
    config = case.config("slow-disk", checkpoint_every=6, checkpoint_minutes=2.0, checkpoint=AT_ONCE)
    assert saved_steps(ALONE, config) == [6, 8]


def test_a_save_is_being_written_until_it_is_on_disk(case):
    trainer = Trainer(case.config("writing"), ALONE)
    writer = trainer.folder.checkpoints
    assert not writer.is_writing
    trainer._checkpoint()
    while writer.is_writing:
        time.sleep(0.01)
    assert [step for step, _ in step_folders(writer.root)] == [0]
    trainer.folder.finish()
    assert not writer.is_writing


def test_a_run_may_go_on_with_other_minutes(case, alone):
    trainer = Trainer(case.config("alone", checkpoint_minutes=5.0), ALONE)
    assert trainer.step == 8
    trainer.folder.finish()


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.inf, math.nan])
def test_minutes_out_of_range_are_refused(case, minutes):
    with pytest.raises(ConfigError, match=f"checkpoint_minutes = {minutes}: must be positive; omit it"):
        case.config("x", checkpoint_minutes=minutes)


def test_the_best_checkpoint_is_kept_and_named_also_by_a_run_that_resumes(case, monkeypatch, capsys):
    losses = {1: 0.5, 2: 3.0, 4: 1.25, 6: 2.0, 8: math.nan}
    monkeypatch.setattr(HeldOut, "losses", lambda _, engine: {HELD_OUT_LOSS: losses[engine.optimizer.num_updates]})
    changes = {
        "schedule": {"kind": "constant"}, "checkpoint_every": 1, "eval_every": 2,
        "checkpoint": {"keep_last": 1, "keep_best": True},
    }  # fmt: skip
    config = case.config("best", steps=5, **changes)
    losses[5] = 9.0
    train(config)
    root = config.output / "checkpoints"
    assert [step for step, _ in step_folders(root)] == [1, 5]
    (root / "step-00000001").rename(case.folder / "moved-away")  # a user's wish; the next best counts from now on
    (config.output / METRICS).unlink()
    train(dataclasses.replace(config, steps=6))
    assert [step for step, _ in step_folders(root)] == [6]
    capsys.readouterr()
    train(dataclasses.replace(config, steps=8))
    assert [step for step, _ in step_folders(root)] == [6, 8]
    assert f"checkpoint with the lowest held-out loss, 2.0000: {root / 'step-00000006'}\n" in capsys.readouterr().err
    train(dataclasses.replace(config, steps=8, checkpoint=CheckpointConfig()))
    assert "lowest held-out loss" not in capsys.readouterr().err


def test_a_loss_measured_after_an_interruption_counts_for_the_best_checkpoint(case, monkeypatch):
    losses = {1: 5.0, 2: 3.0, 4: 2.0, 6: 4.0}
    monkeypatch.setattr(HeldOut, "losses", lambda _, engine: {HELD_OUT_LOSS: losses[engine.optimizer.num_updates]})
    config = case.config(
        "interrupted", steps=6, schedule={"kind": "constant"}, checkpoint_every=2, eval_every=2,
        checkpoint={"keep_last": 1, "keep_best": True},
    )  # fmt: skip
    trainer = Trainer(config, ALONE)
    stop_in(trainer, 4)
    with pytest.raises(Interrupted, match="step 4 "):
        trainer.run()
    train(config)
    assert [step for step, _ in step_folders(config.output / "checkpoints")] == [4, 6]
