"""Data that a run leaves out: which step gets which, on any number of ranks, resumed anywhere, and in whole runs."""

import dataclasses
import shutil

import pytest
import torch
from train_cases import make_case

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.errors import ConfigError
from megacoder.data.digest import step_digest
from megacoder.data.fim import FimConfig
from megacoder.data.prefetch import Prefetcher
from megacoder.data.skipping import data_step
from megacoder.data.stream import merge_states
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.world import World
from megacoder.train.config import DataConfig
from megacoder.train.loop import Trainer, train
from megacoder.train.metrics_log import read_metrics
from megacoder.train.setup import load_tokenizer, open_stream

RANGES = [
    [], [(1, 1)], [(3, 4)], [(3, 4), (3, 3)], [(5, 6), (2, 2)], [(2, 4), (9, 12), (6, 6)], [(4, 4), (4, 5), (1, 2)],
]  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("skipping"))


def skipping(case, output, *ranges, **changes):
    config = case.config(output, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, skip_steps=ranges))


@pytest.mark.parametrize("left_out", RANGES)
def test_each_range_is_cut_out_of_what_the_ranges_before_it_leave(left_out):
    served = list(range(1, 60))
    for first, last in left_out:
        del served[first - 1 : last]
    assert [data_step(step, left_out) for step in range(1, 31)] == served[:30]


@pytest.mark.parametrize("text", ["0:3", "3:2", "1-2", "", ":4", "-1"])
def test_malformed_ranges_are_refused(case, text):
    with pytest.raises(ConfigError, match=r"^data.skip_steps '.*': expected A:B with 1 <= A <= B"):
        skipping(case, "x", text)


def test_megatrons_order_has_no_data_to_spare(case):
    data = case.config("x").data
    with pytest.raises(ConfigError, match=r'data\.skip_steps with data\.compat = "megatron"'):
        DataConfig(train=data.train, tokenizer=data.tokenizer, compat="megatron", skip_steps=("3",))


def served(config, dp, steps, *, state=None, workers=0):
    """(digests of `steps` steps, the state after them) of `dp` ranks."""
    tokenizer, digests = load_tokenizer(config), []
    ranks = [
        Prefetcher(open_stream(config, tokenizer, dp_rank=rank, dp_size=dp), workers=workers) for rank in range(dp)
    ]
    for rank in ranks if state is not None else ():
        rank.load_state_dict(state)
    for _ in range(steps):
        digests.append(step_digest([rank.next_batch() for rank in ranks], first_window=0))
    state = merge_states([rank.state_dict() for rank in ranks])
    for rank in ranks:
        rank.close()
    return digests, state


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_ranks_and_resumptions_change_nothing(case, packing):
    config = skipping(case, "ranks", "2:4", "5", "3")
    stream = dataclasses.replace(config.data.stream, packing=packing, document_masks=True, fim=FimConfig(rate=0.5))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, stream=stream))
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, skip_steps=()))
    digests, _ = served(whole, 1, 15)
    expected = [digests[data_step(step, [(2, 4), (5, 5), (3, 3)]) - 1] for step in range(1, 9)]
    for dp, workers in ((1, 2), (2, 1), (8, 0)):
        assert served(config, dp, 8, workers=workers)[0] == expected
    for step in range(1, 8):
        first, state = served(config, 2, step, workers=1)
        assert first + served(config, 4, 8 - step, state=state)[0] == expected


def run(world, config):
    Trainer(config, world).run()


def test_a_run_that_goes_back_and_leaves_data_out_is_one_that_never_had_them(ranks, case):
    expected = skipping(case, "without", "4:5")
    train(expected)
    config = skipping(case, "spiked")
    train(config)
    later = dataclasses.replace(config, data=expected.data)
    with pytest.raises(ConfigError, match=r"skip_steps = \['4:5'\]: .* 8 steps, and step 4 would have had other data"):
        train(later)
    for step in (6, 8):
        shutil.rmtree(config.output / "checkpoints" / f"step-{step:08}")
    ranks.run(2, run, dataclasses.replace(later, parallel=ParallelConfig(tp=2), checkpoint_every=2))
    rows, reference = (read_metrics(one.output / "metrics.jsonl") for one in (config, expected))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], rel=2e-5)
    shutil.rmtree(config.output / "checkpoints" / "step-00000008")
    run(World(0, 1, 0, torch.device("cpu"), None), later)  # from step 6, beyond what is left out
    rows = read_metrics(config.output / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], rel=2e-5)
    assert CheckpointReader(config.output / "checkpoints").state["data"]["windows"] == (8 + 2) * 8
