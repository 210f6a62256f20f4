"""A run that enlarges the vocabulary of its weights: the same rows in every layout, and nearly the same model."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from checkpoint_cases import blank, lay_out, make_tensors, no_flush, save_as_ranks, state_of  # noqa: F401
from data_samples import write_texts
from train_cases import ALONE, changed, functions, leave, losses_of, make_case

from megacoder.checkpoint import reader as reader_module
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.errors import CheckpointError, ConfigError
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_extending import extend_tokenizer
from megacoder.model.conversion import model_of
from megacoder.model.transformer import Transformer
from megacoder.parallel.config import ParallelConfig
from megacoder.train.fragments import load_weights
from megacoder.train.loop import Trainer
from megacoder.train.setup import load_tokenizer

NEW = 100
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """With `untied` and `tied`: two steps of a model of some 300 ids. NEW more are padded to 512, so that of four
    tensor-parallel ranks the third has old rows and new ones, and the last new ones and padding."""
    case = make_case(tmp_path_factory.mktemp("enlarging"))
    for name in ("untied", "tied"):
        Trainer(config_of(case, name, tied=name == "tied", more=0), ALONE).run()
    assert 256 < case.vocab_size < 384 < case.vocab_size + NEW < 512
    return case


def config_of(case, output, *, tied=False, more=NEW, **changes):
    shape = {"vocab_size": case.vocab_size + more, "tie_word_embeddings": tied}
    return changed(case.config(output, steps=2, checkpoint_every=2, model=shape), **changes)


def enlarged(tensor, kind, more):
    """The reference."""
    row = tensor.double().mean(dim=0).float() if kind == "weight" else torch.zeros(tensor.shape[1:])
    return torch.cat([tensor, row.expand(more, *tensor.shape[1:])])


@pytest.mark.parametrize("seed", range(8))
def test_any_part_of_a_larger_tensor_is_read(tmp_path, monkeypatch, seed):
    """Shards along any dim, and flat ranges of them; some hold no stored row, some no new one."""
    monkeypatch.setattr(reader_module, "CHUNK_ELEMENTS", 32)  # a mean over several chunks
    tensors, rng = make_tensors({"norm": (7,), "matrix": (9, 5), "cube": (3, 4, 5)}, seed), random.Random(seed)
    save_as_ranks(tmp_path, 1, lay_out(tensors, tp=2, dp=2, random=rng))
    larger = {(kind, name): enlarged(tensor, kind, 6) for (kind, name), tensor in tensors.items()}
    reader, names = CheckpointReader(tmp_path), {name for _, name in tensors}
    for fragments in lay_out(larger, tp=3, dp=3, random=rng):
        empty = [blank(fragment) for fragment in fragments]
        reader.read_all(empty, growing=names)
        for found, expected in zip(empty, fragments, strict=True):
            assert torch.equal(found.data, expected.data), str(found)
            with pytest.raises(CheckpointError, match=r"has shape .*; the model needs"):
                reader.read(found)


@pytest.mark.parametrize("shape", [(8, 5), (13, 4), (13,)])
def test_fewer_rows_and_other_columns_are_refused(tmp_path, shape):
    save_as_ranks(tmp_path, 1, lay_out(make_tensors({"w": (9, 5)}), tp=1, dp=1, random=random.Random(0)))
    [fragments] = lay_out(make_tensors({"w": shape}), tp=1, dp=1, random=random.Random(0))
    with pytest.raises(CheckpointError, match=r"weight of w has shape \[9, 5\]; the model needs"):
        CheckpointReader(tmp_path).read(fragments[0], growing=["w"])


def start(world, config):
    """What the run holds before its first step, as its first checkpoint."""
    leave(Trainer(config, world))


LAYOUTS = {
    "one process": (1, ParallelConfig()),
    "tp=2": (2, ParallelConfig(tp=2)),
    "dp=2": (2, ParallelConfig()),
    "pp=2": (2, ParallelConfig(pp=2)),
    "tp=4": (4, ParallelConfig(tp=4)),
    "tp=2 dp=2": (4, ParallelConfig(tp=2)),
}


@pytest.mark.parametrize("source", ["untied", "tied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_with_the_same_rows(ranks, case, name, source):
    size, parallel = LAYOUTS[name]
    with_moments = source == "tied"
    config = config_of(
        case, f"{name}-{source}", tied=source == "tied", init_from=case.folder / source, init_optimizer=with_moments,
        parallel=parallel,
    )  # fmt: skip
    ranks.run(size, start, config)
    found, before = state_of(config.output), state_of(case.folder / source)
    assert found.keys() == before.keys()
    for (kind, weight), tensor in before.items():
        expected = tensor if with_moments or kind == "weight" else torch.zeros_like(tensor)
        if weight in VOCABULARY:
            expected = enlarged(expected, kind, NEW)
        assert torch.equal(found[kind, weight], expected), (kind, weight)


def loaded(folder):
    reader = CheckpointReader(folder)
    model = Transformer(model_of(reader))
    load_weights(model, reader)
    return model


@pytest.mark.parametrize("source", ["untied", "tied"])
def test_the_model_goes_on_computing_what_it_did(case, source, capsys):
    """Old logits do not change, and old log-probabilities fall by at most what the new ids' share of the rows is."""
    config = config_of(case, f"same-{source}", tied=source == "tied", init_from=case.folder / source)
    start(ALONE, config)
    old = case.vocab_size
    line = f"vocabulary enlarged from {old} to {old + NEW} rows; the new ones begin as the mean of the others\n"
    assert capsys.readouterr().err.count(line) == 1
    before, after = loaded(case.folder / source), loaded(config.output)
    text = Tokenizer.load(config.data.tokenizer).encode(functions(2, first=90)[1])[:64]
    with torch.no_grad():
        hidden, expected = (model(torch.tensor([text])).flatten(0, 1) for model in (after, before))
        assert torch.equal(hidden, expected)
        logits, expected = (F.linear(hidden, model.lm_head.weight[:old]) for model in (after, before))
        assert torch.equal(logits, expected)
        shift = before.logits(hidden).log_softmax(-1) - after.logits(hidden).log_softmax(-1)[:, :old]
    assert shift.min() > -1e-5
    assert shift.max() < math.log1p(NEW / old) + 1e-5


def test_the_first_loss_is_nearly_that_of_the_weights(case):
    settings = {"init_from": case.folder / "untied", "steps": 1, "checkpoint_every": 1}
    for more in (0, 2):
        Trainer(config_of(case, f"first-{more}", more=more, **settings), ALONE).run()
    [before], [after] = (losses_of(case.folder / f"first-{more}") for more in (0, 2))
    assert 0 < after - before < math.log1p(2 / case.vocab_size)


def test_a_run_that_goes_on_does_not_enlarge_again(case, capsys):
    """The rows that it has trained stay."""
    whole = config_of(case, "whole", init_from=case.folder / "untied", schedule={"warmup_steps": 0})
    parts = changed(whole, output=case.folder / "parts", checkpoint_every=1)
    Trainer(whole, ALONE).run()
    trainer = Trainer(parts, ALONE)
    trainer.update()
    leave(trainer)
    capsys.readouterr()
    Trainer(parts, ALONE).run()
    assert "enlarged" not in capsys.readouterr().err
    found, expected = state_of(parts.output), state_of(whole.output)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    head = expected["weight", "lm_head.weight"][case.vocab_size :]
    assert not torch.equal(head, head.mean(dim=0).expand_as(head)), "trained, and yet all alike"


def test_where_a_vocabulary_cannot_change_so_a_line_says_what_to_do(case):
    small, source = Tokenizer.load(case.folder / "tokenizer"), case.folder / "untied"
    config = config_of(case, "smaller", more=-1, init_from=source)
    with pytest.raises(
        ConfigError, match=rf"has {small.vocab_size} ids; set model\.vocab_size = {small.vocab_size}, or"
    ):
        load_tokenizer(config)
    wide = config_of(case, "wide", init_from=source)
    start(ALONE, wide)
    with pytest.raises(
        ConfigError,
        match=rf"made with vocab_size = {case.vocab_size + NEW}, not {case.vocab_size}; set the same or a larger",
    ):
        start(ALONE, config_of(case, "narrow", more=0, init_from=wide.output))
    with pytest.raises(
        ConfigError, match=r"made with model\.vocab_size = .*; set it back, or choose another output, and go on from"
    ):
        start(ALONE, config_of(case, "wide", more=NEW + 1, init_from=source))


def test_a_run_trains_with_an_extended_tokenizer(case, tmp_path):
    """Whose ids the weights do not have."""
    extend_tokenizer(case.folder / "tokenizer", tmp_path / "tokenizer", ["<|more|>"])
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    write_texts(tmp_path / "train", functions(20), tokenizer)
    data = {"tokenizer": tmp_path / "tokenizer", "train": (tmp_path / "train",), "valid": ()}
    settings = {"init_from": case.folder / "untied", "data": data}
    with pytest.raises(ConfigError, match=rf"set model\.vocab_size = {tokenizer.vocab_size}, or what the weights"):
        start(ALONE, config_of(case, "extended", more=0, **settings))
    Trainer(config_of(case, "extended", more=1, **settings), ALONE).run()
    assert all(map(math.isfinite, losses_of(case.folder / "extended")))
