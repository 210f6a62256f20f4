"""A run that goes on in another run's data: what it is served, on any number of ranks, and what is refused."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch
from data_samples import small_tokenizer, source_texts, write_dataset
from train_cases import ALONE, changed, functions, make_case, run, write_texts

from megacoder.cli.main import main
from megacoder.core.config import to_toml
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.continuing import continued
from megacoder.data.fim import FimConfig
from megacoder.data.stream import StreamConfig, TokenStream, merge_states
from megacoder.data.tokenizer import Tokenizer
from megacoder.parallel.config import ParallelConfig
from megacoder.train.loop import Trainer, train
from megacoder.train.metrics_log import read_metrics

NO_FIM = FimConfig(rate=0.0)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Three sets of source files, of different sizes."""
    folder, ids = tmp_path_factory.mktemp("sets"), [small_tokenizer().encode(text[:1500]) for text in source_texts(120)]
    eos = small_tokenizer().eos_id
    return [
        write_dataset(folder / str(number), [[[*text, eos]] for text in ids[part]])
        for number, part in enumerate((slice(70), slice(70, 100), slice(100, 120)))
    ]


def ranks(datasets, dp_size=1, *, batch=8, weights=(), fim_rates=(), seq_length=64, **config):
    config = StreamConfig(**{"seq_length": seq_length, "num_streams": 8, **config})
    return [
        TokenStream(
            datasets, small_tokenizer(), config, global_batch_size=batch, weights=weights, fim_rates=fim_rates,
            dp_rank=rank, dp_size=dp_size,
        )
        for rank in range(dp_size)
    ]  # fmt: skip


def state_of(streams):
    """By way of a checkpoint's JSON."""
    return json.loads(json.dumps(merge_states([one.state_dict() for one in streams])))


def go_on(first, second):
    state = state_of(first)
    for one in second:
        one.load_state_dict(continued(state, one.state_dict()))
    return second


def windows(streams, steps):
    """The windows of `steps` steps in the run's order, (windows, S)."""
    taken = []
    for _ in range(steps):
        first, batches = streams[0].windows, [one.next_batch() for one in streams]
        whole = torch.empty(sum(len(batch.tokens) for batch in batches), batches[0].tokens.shape[1], dtype=torch.int64)
        for rank, batch in enumerate(batches):
            whole[(rank - first) % len(batches) :: len(batches)] = batch.tokens
        taken.append(whole)
    return torch.cat(taken)


@pytest.mark.parametrize("options", [{}, {"packing": "best_fit", "document_masks": True}], ids=["cut", "best_fit"])
def test_with_the_same_settings_it_is_served_what_would_have_come_next(datasets, options):
    whole = windows(ranks(datasets, weights=[3, 2, 1], **options), 12)
    first = ranks(datasets, 2, weights=[3, 2, 1], **options)
    windows(first, 5)
    second = go_on(first, ranks(datasets, 4, weights=[3, 2, 1], **options))
    assert torch.equal(windows(second, 3), whole[40:64])
    third = ranks(datasets, 8, weights=[3, 2, 1], **options)  # the new run is resumed as any
    for one in third:
        one.load_state_dict(state_of(second))
    assert torch.equal(windows(third, 4), whole[64:])


@pytest.mark.parametrize(("batch", "dp_size"), [(4, 1), (12, 3), (20, 4)])
def test_with_another_batch_size_the_sequence_is_the_same(datasets, batch, dp_size):
    whole = windows(ranks(datasets), 20)
    first = ranks(datasets, 2)
    windows(first, 3)
    assert torch.equal(windows(go_on(first, ranks(datasets, dp_size, batch=batch)), 5), whole[24 : 24 + 5 * batch])


def test_longer_windows_go_on_after_the_last_token_of_each_stream(datasets):
    first = ranks(datasets[:1])
    windows(first, 2)
    long = windows(go_on(first, ranks(datasets[:1], seq_length=128)), 1)
    short = windows(go_on(first, ranks(datasets[:1])), 2)
    assert torch.equal(long, torch.cat([short[:8], short[8:]], dim=1))


def numbered(folder, count, offset):
    """Documents of one window each (with BOS, and EOS that ends them), of one token that tells them apart."""
    eos = small_tokenizer().eos_id
    return write_dataset(folder / str(offset), [[[*[offset + number] * 7, eos]] for number in range(count)])


def test_with_other_weights_and_more_datasets_each_goes_on_where_it_was(tmp_path):
    sets = [numbered(tmp_path, 64, 0), numbered(tmp_path, 64, 100), numbered(tmp_path, 32, 200)]
    options = {"num_streams": 4, "seq_length": 9, "fim": NO_FIM, "batch": 8}
    served = Counter()
    first = ranks(sets[:2], weights=[1, 1], **options)
    served.update(windows(first, 4)[:, 1].tolist())  # 16 of each
    second = go_on(first, ranks(sets, 2, weights=[1, 0, 1], **options))
    served.update(windows(second, 4)[:, 1].tolist())
    assert {document for document in served if 100 <= document < 200} == {
        document
        for document in windows(ranks(sets[:2], weights=[1, 1], **options), 4)[:, 1].tolist()
        if document >= 100
    }, "nothing is drawn from a dataset of weight 0"
    third = go_on(second, ranks(sets, 4, weights=[2, 3, 1], **options))
    served.update(windows(third, 12)[:, 1].tolist())
    counts = [sum(number for document, number in served.items() if document // 100 == part) for part in range(3)]
    assert counts == [16 + 16 + 32, 16 + 48, 16 + 16]
    assert set(served.values()) == {1}, "one epoch of each dataset, on the way through three blends"


@pytest.mark.parametrize("dp_size", [1, 4])
def test_with_other_fill_in_the_middle_only_the_files_under_way_are_disturbed(datasets, dp_size):
    options = {"num_streams": 4, "add_bos": False}
    first = ranks(datasets[:1], fim=FimConfig(rate=1.0), **options)
    windows(first, 3)
    second = go_on(first, ranks(datasets[:1], dp_size, fim=NO_FIM, **options))
    tokens = windows(second, 3)
    assert not (tokens == small_tokenizer().fim_begin_id).any()
    assert (
        windows(go_on(first, ranks(datasets[:1], fim=FimConfig(rate=1.0), **options)), 3)
        == small_tokenizer().fim_begin_id
    ).any()


def test_a_file_that_has_become_shorter_than_the_place_in_it_is_over(tmp_path):
    eos = small_tokenizer().eos_id
    dataset = write_dataset(tmp_path / "set", [[[*[number] * 20, eos]] for number in range(40, 80)])
    first = ranks([dataset], num_streams=1, seq_length=24, batch=1, fim=FimConfig(rate=1.0), add_bos=False)
    state = state_of(first)
    state |= {"windows": 1, "streams": [[0, 0, 0, 0, 0, 23]]}  # of 21 stored tokens, and 24 with the sentinels
    (second,) = ranks([dataset], num_streams=1, seq_length=21, batch=1, fim=NO_FIM, add_bos=False)
    second.load_state_dict(continued(state, second.state_dict()))
    assert len(set(second.next_batch().tokens.flatten().tolist())) == 2, "the next document, whole"
    second.load_state_dict({**second.state_dict(), "first_window": 0, "streams": state["streams"]})
    with pytest.raises(DataError, match=r"position is token 23 of sequence \d+, which has 21; is this a diff"):
        second.next_batch()  # its own place


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ([0], {}, r"data.train has 1 datasets, but the run of init_from has 2; datasets keep their places \(weight 0"),
        (
            [1, 0],
            {},
            r"dataset 1 of data.train has 30 documents and [\d,]+ tokens, but that of the run of init_from 70",
        ),
        (
            [0, 1],
            {"seed": 1},
            "data.stream.seed is 1, but the run of init_from has read its data with 1234; set it bac",
        ),
        ([0, 1], {"add_bos": False}, "data.stream.add_bos is False, but .* with True"),
        (
            [0, 1],
            {"packing": "best_fit", "document_masks": True},
            "stream.packing is 'best_fit', .* with 'concatenate'",
        ),
        ([0, 1], {"num_streams": 4}, "data.stream.num_streams cuts dataset 1 into 4 streams, but .* has read 8"),
    ],
)
def test_a_place_that_would_mean_something_else_is_refused(datasets, sets, options, message):
    first, (second,) = ranks(datasets[:2]), ranks([datasets[number] for number in sets], **options)
    with pytest.raises(ConfigError, match=message):
        continued(state_of(first), second.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 32}, "data.stream.seq_length is 32, but the run of init_from has read its data with 64"),
        ({"fim": NO_FIM}, "data.stream.fim is .* packs files as they are served"),
        ({"fim_rates": [0.5, 0.1]}, r"data.fim_rates is \[0.5, 0.1\], but .* with \[0.5, 0.5\], and packing"),
    ],
)
def test_best_fit_keeps_the_length_of_windows_and_files(datasets, changes, message):
    options = {"packing": "best_fit", "document_masks": True}
    first, (second,) = ranks(datasets[:2], **options), ranks(datasets[:2], **options | changes)
    with pytest.raises(ConfigError, match=message):
        continued(state_of(first), second.state_dict())
    more = {"weights": [1, 1, 2], "fim_rates": [0.5, 0.5, 0.0]}
    go_on(first, ranks(datasets, **options | more))


def test_a_place_in_another_kind_of_order_is_refused(datasets):
    (ours,) = ranks(datasets)
    for order, message in (
        ({"conversations": 3}, "the run of init_from was tuned on conversations; leave init_data out"),
        ({"compat": "megatron"}, "the run of init_from reads Megatron's order of samples"),
        ({}, "of an earlier version"),
    ):
        with pytest.raises(ConfigError, match=message):
            continued({"windows": 8, "order": order, "streams": []}, ours.state_dict())


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """With a run of six steps, and a dataset to add."""
    case = make_case(tmp_path_factory.mktemp("continuing"))
    write_texts(case.folder / "more", functions(20, first=300), Tokenizer.load(case.folder / "tokenizer"))
    run(ALONE, case.config("old", steps=6, schedule={"kind": "constant"}))
    return case


def going_on(case, output, **changes):
    settings = {"init_from": case.folder / "old", "init_optimizer": True, "init_data": True, "steps": 6}
    return case.config(output, **settings | {"schedule": {"kind": "constant", "warmup_steps": 0}} | changes)


def test_a_run_that_goes_on_with_everything_is_the_longer_run(case, ranks, capfd):
    run(ALONE, case.config("long", steps=12, schedule={"kind": "constant"}))
    expected = [row["loss"] for row in read_metrics(case.folder / "long" / "metrics.jsonl")][6:]
    capfd.readouterr()
    new = going_on(case, "new")
    train(new)
    said = capfd.readouterr().err
    assert "weights, optimizer state and place in the data of " in said
    assert "will be read in the same order" not in said
    assert [row["loss"] for row in read_metrics(new.output / "metrics.jsonl")] == expected
    shutil.rmtree(new.output / "checkpoints" / "step-00000006")
    train(new)
    assert [row["loss"] for row in read_metrics(new.output / "metrics.jsonl")] == expected, "resumed, bit for bit"
    shutil.rmtree(new.output / "checkpoints" / "step-00000006")
    ranks.run(2, run, dataclasses.replace(new, parallel=ParallelConfig(dp=2)))
    rows = read_metrics(new.output / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=2e-5)
    both = dataclasses.replace(
        new, output=case.folder / "new-2", parallel=ParallelConfig(tp=2, dp=2), micro_batch_size=4
    )
    ranks.run(4, run, both)
    rows = read_metrics(both.output / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=2e-5), "begun in another layout"
    main(["report", str(new.output)])
    assert "48 windows of 32 tokens, after 48 windows in the run" in (new.output / "report.html").read_text()


def digests(capsys, toml, steps, *words):
    main(["data", "digest", str(toml), "--steps", steps, "--json", *words])
    return list(json.loads(capsys.readouterr().out).values())


def test_skipped_steps_count_from_the_new_runs_start(case, capsys):
    old = digests(capsys, case.toml("old-data"), "1:14")
    new = changed(going_on(case, "skips"), data={"skip_steps": ("2:3",)})
    path = case.folder / "skips.toml"
    path.write_text(to_toml(new))
    expected = [old[6], *old[9:14]]
    assert digests(capsys, path, "1:6", "--dp", "4") == expected
    trainer = Trainer(dataclasses.replace(new, steps=4, checkpoint_every=2), ALONE)
    trainer.run()
    for step in (2, 4):
        checkpoint = new.output / "checkpoints" / f"step-{step:08}"
        assert digests(capsys, path, f"{step + 1}:6", "--checkpoint", str(checkpoint)) == expected[step:]


def test_a_dataset_may_be_added_and_one_left_out(case):
    data = {"train": (case.folder / "train", case.folder / "more"), "weights": (0.0, 1.0)}
    train(going_on(case, "added", data=data, global_batch_size=4, steps=2))
    data = {"train": (case.folder / "more",)}
    with pytest.raises(ConfigError, match=r"dataset 1 of data.train has 20 documents and .* keep their places"):
        train(going_on(case, "removed", data=data))
    assert not (case.folder / "removed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None, "init_optimizer": False}, "init_data = true without init_from"),
        (
            {"data": {"compat": "megatron", "stream": {"add_bos": False}}},
            'init_data = true with data.compat = "megatron"',
        ),
        ({"data": {"conversations": {"train": ("chats",)}}}, "init_data = true with data.conversations"),
        (
            {"init_data": False, "data": {"train": ("a", "b"), "weights": (1.0, 0.0)}},
            "weights = .*: 0.0 is not a posit",
        ),
        ({"data": {"weights": (0.0,)}}, "at least one must be a positive"),
    ],
)
def test_settings_without_a_place_to_go_on_from_are_refused(case, changes, message):
    with pytest.raises(ConfigError, match=message):
        going_on(case, "refused", **changes)


def test_another_dataset_of_the_same_size_is_refused(case, tmp_path):
    copied = tmp_path / "train"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{case.folder / 'train'}{suffix}", f"{copied}{suffix}")
    tokens = bytearray((tmp_path / "train.bin").read_bytes())
    tokens[0] ^= 1
    (tmp_path / "train.bin").write_bytes(tokens)
    with pytest.raises(ConfigError, match=r"is another dataset .* put that one back, or leave init_data out"):
        train(going_on(case, "other-data", data={"train": (copied,)}))
    assert not (case.folder / "other-data").exists()


def test_what_is_read_again_is_not_announced_where_it_is_left_out(case, capfd):
    for skip, announced in (("1:6", False), ("1:5", True)):
        config = going_on(case, f"skip-{skip[-1]}", init_data=False, steps=1)
        train(changed(config, data={"skip_steps": (skip,)}))
        said = capfd.readouterr().err
        assert ("init_data = true goes on where that run stopped" in said) == announced
