"""How often a run reads its datasets, and how it says so."""

import pytest
from train_cases import ALONE, make_case

from megacoder.data.readings import Reading, describe_readings, readings
from megacoder.train.loop import Trainer


def order(sizes, weights):
    return {"datasets": [[1, size] for size in sizes], "weights": weights, "num_streams": 4}


def test_windows_are_counted_from_where_the_run_begins():
    whole = order([100, 50, 30], [0.5, 0.5, 0.0])
    reads = readings(whole, seq_length=10, num_windows=40, first_window=7)
    assert [read.windows for read in reads] == [20, 20, 0]
    assert [read.times for read in reads] == [2.0, 4.0, 0.0]
    parts = [readings(whole, seq_length=10, num_windows=9, first_window=first) for first in (0, 9, 18)]
    together = readings(whole, seq_length=10, num_windows=27)
    assert [sum(one.windows for one in part) for part in zip(*parts, strict=True)] == [one.windows for one in together]


def test_orders_that_do_not_tell_are_left_out():
    assert readings({"conversations": 3}, seq_length=10, num_windows=5) == []
    assert readings({"datasets": [[1, 5], [1, 5]], "compat": "megatron"}, seq_length=10, num_windows=5) == []
    assert describe_readings(["a"], []) == []


def many(times, tokens=1000):
    return [Reading(tokens=tokens, windows=1, share=1 / len(times), times=one) for one in times]


@pytest.mark.parametrize(
    ("times", "lines"),
    [
        ([0.91], ["data/0: 1,000 tokens, each read 0.9 times"]),
        ([0.0123], ["data/0: 1,000 tokens, each read 0.01 times"]),
        (
            [0.9, 5.3],
            [
                "data/0: 1,000 tokens, 50.0% of the run, 0.9 times; data/1: 1,000 tokens, 50.0% of the run, 5.3 times",
                "read many times over: data/1 5.3 times; beyond about 4 times the same data teach ever less",
            ],
        ),
        ([0.4] * 19 + [2.0], ["20 datasets, 20,000 tokens, read 0.4 times (data/0) to 2.0 times (data/19)"]),
        (
            [1.0] + [float(one) for one in range(5, 10)] + [24000.04],
            [
                "7 datasets, 7,000 tokens, read 1.0 times (data/0) to 24,000.0 times (data/6)",
                "read many times over: data/6 24,000.0 times, data/5 9.0 times, data/4 8.0 times, data/3 7.0 times",
            ],
        ),
    ],
)
def test_a_line_says_it_of_any_number_of_datasets(times, lines):
    said = describe_readings([f"data/{number}" for number in range(len(times))], many(times))
    assert len(said) == len(lines)
    assert all(text.startswith(line) for text, line in zip(said, lines, strict=True)), said


def test_a_run_says_how_often_it_reads_its_data(tmp_path, capfd):
    case = make_case(tmp_path)
    config = case.config("run", steps=200)
    trainer = Trainer(config, ALONE)
    trainer.batches.close()
    said = capfd.readouterr().err
    (size,) = (tokens for _, tokens in trainer.batches.state_dict()["order"]["datasets"])
    times = 200 * 8 * 32 / size
    assert f"{case.folder / 'train'}: {size:,} tokens, each read {times:.1f} times\n" in said
    assert f"read many times over: {case.folder / 'train'} {times:.1f} times" in said
