"""A rank that computes more slowly than its peers is found, without collectives of its own."""

import dataclasses
import re
import time

import pytest
from train_cases import ALONE, make_case

from megacoder.core.timing import HostTimer
from megacoder.parallel.config import ParallelConfig
from megacoder.train import loop
from megacoder.train.loop import Trainer, train
from megacoder.train.metrics_log import read_metrics
from megacoder.train.pace import MEASURED_EVERY, ComputeClock
from megacoder.train.report import write_run_report


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("pace"))


def two_replicas(case, name, *, steps):
    """Without held-out data, which would take time, too."""
    config = case.config(name, parallel=ParallelConfig(dp=2), micro_batch_size=4, steps=steps, checkpoint_every=steps)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, valid=()))


def slowed(world, config, slow_rank, seconds, every=1):
    """What the rank says in a run in which one rank takes `seconds` more for each step; the journal's notes by step."""
    trainer, lines, counts = Trainer(config, world), [], []
    trainer.pace.every = every
    microbatches, update = trainer.engine.microbatches, trainer.update

    def slow_microbatches(*arguments):
        if world.rank == slow_rank:
            time.sleep(seconds)
        return microbatches(*arguments)

    def counted_update():
        before = world.journal.moves
        result = update()
        counts.append(world.journal.moves - before)
        return result

    trainer.engine.microbatches, trainer.update = slow_microbatches, counted_update
    real, loop.say = loop.say, lines.append
    try:
        trainer.run()
    finally:
        loop.say = real
    return [line for line in lines if " is slow" in line], counts


def test_a_slow_rank_is_logged_and_named_once(case, ranks):
    config = two_replicas(case, "slow", steps=6)
    (lines, _), (other_lines, _) = ranks.run(2, slowed, config, 1, 1.5)
    assert other_lines == []
    (line,) = lines
    assert re.match(r"step [45]: rank 1 is slow, in 3 measured steps in a row: it computes for ", line)
    rows = read_metrics(config.output / "metrics.jsonl")
    assert "slowest_rank" not in rows[0], "what step 1 took travels with step 2"
    assert "slowest_rank" in rows[1]
    for row in rows[2:]:  # the first step also prepares what later ones use
        assert row["slowest_rank"] == 1
        assert row["slowest_rank_ratio"] > 1.2
    write_run_report(config.output, config.output / "report.html")
    assert "slowest rank" in (config.output / "report.html").read_text()


def test_waiting_for_a_slow_rank_is_not_slow(case, ranks):
    """The slow rank is the first stage of a pipeline, which has other work than the second, and no peer."""
    config = case.config("stages", parallel=ParallelConfig(pp=2), steps=3, eval_every=100)
    for lines, _ in ranks.run(2, slowed, config, 0, 0.2):
        assert lines == []
    assert not any("slowest_rank" in row for row in read_metrics(config.output / "metrics.jsonl"))


def test_steps_are_measured_at_times_and_no_collective_is_added(case, ranks):
    config = two_replicas(case, "at-times", steps=6)
    results = ranks.run(2, slowed, config, 1, 0.05, 2)
    assert [row["step"] for row in read_metrics(config.output / "metrics.jsonl") if "slowest_rank" in row] == [3, 5]
    for _, counts in results:
        assert len(set(counts[1:5])) == 1, "measured or not, a step makes the same collectives"


def test_one_process_has_no_peers_and_measures_its_data(case):
    config = case.config("one", steps=MEASURED_EVERY + 2, checkpoint_every=100)
    train(config)
    rows = read_metrics(config.output / "metrics.jsonl")
    assert not any("slowest_rank" in row for row in rows)
    assert [row["step"] for row in rows if "data_seconds" in row] == [MEASURED_EVERY + 1]


def waiting(world, config, seconds):
    """What the rank says in a run in which the last rank's batches are late."""
    trainer, lines = Trainer(config, world), []
    trainer.pace.every, next_batch = 1, trainer.batches.next_batch

    def late_batch():
        time.sleep(seconds * (world.rank == world.size - 1))
        return next_batch()

    trainer.batches.next_batch = late_batch
    real, loop.say = loop.say, lines.append
    try:
        trainer.run()
    finally:
        loop.say = real
    return [line for line in lines if "for data" in line]


@pytest.mark.parametrize(("axes", "size"), [({}, 1), ({"dp": 2}, 2), ({"pp": 2}, 2)])
def test_waiting_for_data_is_measured_and_named_once(case, ranks, axes, size):
    config = case.config(f"late-{axes}", parallel=ParallelConfig(**axes), micro_batch_size=4, steps=6, eval_every=100)
    lines, *others = [waiting(ALONE, config, 0.2)] if size == 1 else ranks.run(size, waiting, config, 0.2)
    assert all(other == [] for other in others)
    (line,) = lines
    who = "training waits" if size == 1 else "rank 1 waits"
    assert re.match(
        rf"step [456]: {who} for data for \d+% of the step \(0\.2\d* s\), in 3 measured steps in a row; ", line
    )
    rows = read_metrics(config.output / "metrics.jsonl")
    assert [row["step"] for row in rows if "data_seconds" in row] == [2, 3, 4, 5, 6]
    assert all(0.2 <= row["data_seconds"] < row["step"] for row in rows[1:])
    write_run_report(config.output, config.output / "report.html")
    assert "waiting for data" in (config.output / "report.html").read_text()


def test_waiting_is_named_above_a_share_of_the_step_and_once_in_a_row(case):
    trainer = Trainer(case.config("shares"), ALONE)
    trainer.batches.close()
    trainer.pace._step_seconds = 2.0
    waits = [0.11, 0.11, 0.09, 0.11, 0.11, 0.2, 0.2, 0.2]
    named = [bool(trainer.pace.compare([seconds])[1]) for seconds in waits]
    assert named == [False] * 5 + [True] + [False] * 2
    assert trainer.pace.compare([]) == ({}, [])


def test_the_clock_leaves_out_what_is_spent_waiting(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(HostTimer, "mark", lambda self: next(times))
    clock = ComputeClock(HostTimer())
    clock.begin()
    for operation in ("all-reduce", "receive"):
        clock.entered(operation)
        clock.left()
    clock.end()
    assert clock.seconds() == 1.0 + 0.5 + 0.25
