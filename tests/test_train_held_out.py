"""An evaluation reads each held-out token once at most, the same ones in every layout."""

import dataclasses
import math

import pytest
import torch
from train_cases import make_case

from megacoder.core.errors import AlikeOnAllRanks
from megacoder.data.indexed import IndexedDataset
from megacoder.data.stream import StreamConfig
from megacoder.model.init import init_weights
from megacoder.model.transformer import Transformer
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.world import World
from megacoder.train.loop import Trainer, train

ALONE = World(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("held-out"))


def evaluated(world, config):
    """(tokens of an evaluation, its loss, global batches) with initial weights."""
    trainer = Trainer(config, world)
    held_out = trainer.held_out
    (batches,) = held_out.batches.values()
    result = held_out.num_tokens["valid"], held_out.losses(trainer.engine)["held_out_loss"], len(batches)
    trainer.folder.finish()
    return result


@pytest.fixture(scope="module")
def once(case):
    return evaluated(ALONE, case.config("once", eval_batches=1000))


def test_an_evaluation_ends_after_one_pass(case, once):
    num_tokens, _, num_batches = once
    stored = IndexedDataset(case.folder / "valid").num_tokens
    assert num_tokens == stored, "each token is predicted, the first of a document after BOS"
    assert num_batches == math.ceil((stored + 10) / (8 * 32)), "10 documents have a BOS each"
    assert evaluated(ALONE, case.config("two", eval_batches=2))[::2] == (pytest.approx(2 * 8 * 32, abs=4), 2)


def test_the_loss_is_the_mean_over_the_tokens_of_the_set(case, once):
    """Also where the last batch is mostly padding."""
    config = case.config("mean", eval_batches=1000)
    trainer, model = Trainer(config, ALONE), Transformer(config.model)
    init_weights(model, seed=config.seed)
    (batches,) = trainer.held_out.batches.values()
    assert sum(int((batch.labels != -100).sum()) for batch in batches) == once[0]
    with torch.no_grad():
        total = sum(model.loss(batch.tokens, batch.labels).item() for batch in batches)
    assert once[1] == pytest.approx(total / once[0], rel=1e-5)
    trainer.folder.finish()


@pytest.mark.parametrize("axis", ["dp", "pp", "tp", "cp"])
def test_every_layout_evaluates_the_same_tokens(case, once, ranks, axis):
    config = case.config(f"layout-{axis}", eval_batches=1000, parallel=ParallelConfig(**{axis: 2}))
    for found in ranks.run(2, evaluated, config):
        assert found == (once[0], pytest.approx(once[1], rel=1e-5), once[2])


def test_a_rank_with_padding_alone_evaluates_a_batch_with_the_others(case, once, ranks):
    """The set has an odd number of windows, of which each of two ranks has one in every batch but the last."""
    num_windows = math.ceil((once[0] + 10) / 32)
    assert num_windows % 2 == 1
    config = case.config("odd", eval_batches=1000, global_batch_size=2, micro_batch_size=1)
    for found in ranks.run(2, evaluated, config):
        assert found == (once[0], pytest.approx(once[1], rel=1e-5), num_windows // 2 + 1)


def test_a_global_batch_larger_than_the_set_is_filled_with_padding(case, ranks, once):
    config = case.config("large", eval_batches=3, global_batch_size=256, micro_batch_size=32)
    stream = StreamConfig(seq_length=32, num_streams=16, document_masks=True, packing="best_fit")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, stream=stream))
    expected = evaluated(ALONE, config)
    assert expected[::2] == (once[0], 1)
    for found in ranks.run(2, evaluated, dataclasses.replace(config, output=case.folder / "large-2")):
        assert found == (once[0], pytest.approx(expected[1], rel=1e-5), 1)


def test_a_run_says_once_how_many_tokens_an_evaluation_has(case, once, capfd):
    train(case.config("said", eval_batches=1000, steps=2))
    assert capfd.readouterr().err.count(f"each held-out loss is of {once[0]:,} tokens of valid\n") == 1


def test_a_best_checkpoint_without_held_out_data_is_said_to_be_none(case, capfd):
    config = case.config("unset", checkpoint={"keep_best": True}, steps=1)
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, valid=())))
    assert "checkpoint.keep_best has no effect: data.valid is unset\n" in capfd.readouterr().err


def test_held_out_data_missing_on_one_rank_stops_all(case, ranks):
    said = ranks.run(2, refusal, case.config("missing"))
    assert said[0] == said[1]
    assert said[0].startswith(f"{case.folder / 'nowhere'}.idx: ")


def refusal(world, config):
    data = dataclasses.replace(config.data, valid=(config.output.parent / "nowhere",))
    with pytest.raises(AlikeOnAllRanks) as raised:
        Trainer(config if world.is_first else dataclasses.replace(config, data=data), world)
    return str(raised.value)
