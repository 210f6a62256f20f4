"""Digests of the data that a run reads: the same for any number of ranks, after resuming, and for an extended run."""

import json

import pytest
import torch
from data_samples import small_tokenizer, write_texts
from train_cases import make_case

from megacoder.cli.data_digest import main
from megacoder.core.errors import ConfigError
from megacoder.data.digest import step_digest
from megacoder.data.sidecar import Sidecar
from megacoder.data.stream import Batch
from megacoder.train.setup import load_tokenizer, open_stream


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("digest"))


def digests(case, capsys, *words, steps="1:6", toml="run"):
    path = case.folder / f"{toml}.toml"
    if not path.exists():
        case.toml(toml)
    main([str(path), "--steps", steps, "--json", *words])
    return json.loads(capsys.readouterr().out)


VARIANTS = {
    "plain": [],
    "masked": ["--data.stream.document-masks"],
    "best fit": ["--data.stream.packing", "best_fit", "--data.stream.document-masks"],
    "masked spans": ["--data.stream.fim.msp-rate", "1"],
    "blend": ["--data.train", "TRAIN", "VALID", "--data.weights", "0.8", "0.2", "--data.fim-rates", "0.9", "0"],
    "megatron": ["--data.compat", "megatron", "--data.stream.no-add-bos", "--data.stream.fim.rate", "0"],
}


def words_of(case, variant):
    paths = {"TRAIN": str(case.folder / "train"), "VALID": str(case.folder / "valid")}
    return [paths.get(word, word) for word in VARIANTS[variant]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_digests_do_not_depend_on_ranks(case, capsys, variant):
    words = words_of(case, variant)
    alone = digests(case, capsys, *words)
    assert len(set(alone.values())) == 6
    for dp in (2, 4, 8):
        assert digests(case, capsys, *words, "--dp", str(dp)) == alone
    assert digests(case, capsys, *words, steps="4:5") == {step: alone[step] for step in ("4", "5")}


@pytest.mark.parametrize("first", range(4))
def test_a_batch_may_begin_at_any_rank(first):
    """As it does behind batches of another size: the order is that of the windows, not of the ranks."""

    def batch(windows):
        rows = torch.tensor(windows)[:, None].expand(-1, 5)
        return Batch(tokens=rows, labels=rows)

    windows = list(range(first, first + 6))
    ranks = [batch([window for window in windows if window % 3 == rank]) for rank in range(3)]
    assert step_digest(ranks, first_window=first) == step_digest([batch(windows)], first_window=first)


def test_data_that_are_left_out_show(case, capsys):
    whole = digests(case, capsys, steps="1:9")
    expected = {str(step): whole[str(step + 3 * (step > 1))] for step in range(1, 7)}
    assert digests(case, capsys, "--data.skip-steps", "2:3", "2", "--dp", "2") == expected


def test_every_setting_shows(case, capsys):
    seen = [tuple(digests(case, capsys, *words_of(case, variant)).values()) for variant in VARIANTS]
    assert len(set(seen)) == len(VARIANTS)


@pytest.mark.parametrize("variant", ["plain", "best fit", "blend"])
def test_a_longer_run_sees_the_same_first(case, capsys, variant):
    words = words_of(case, variant)
    assert digests(case, capsys, *words, "--steps", "1:6") == digests(
        case, capsys, *words, "--steps", "1:6", *("--schedule.warmup-steps", "1"), toml=longer(case)
    )


def longer(case):
    path = case.folder / "longer.toml"
    if not path.exists():
        case.toml("longer", steps=800)
    return "longer"


def test_a_longer_run_reshuffles_megatrons_order(case, capsys):
    """Which is what the keyed order ends; with the samples of the old run it stays."""
    words = words_of(case, "megatron")
    short = digests(case, capsys, *words)
    assert digests(case, capsys, *words, toml=longer(case)) != short
    assert digests(case, capsys, *words, "--data.megatron.num-samples", "64", toml=longer(case)) == short


def test_a_blend_of_different_tokenizers_is_refused(case, tmp_path):
    """By the digest of the tokenizer that each dataset was made with."""
    tokenizer = small_tokenizer()
    tokens = write_texts(tmp_path / "other", ["x = 1\n"], tokenizer).num_tokens
    counts = {"documents": 1, "sequences": 1, "tokens": tokens, "bytes": 6}
    Sidecar(**counts, tokenizer=tokenizer.digest, text_key="content", inputs=()).write(tmp_path / "other")
    words = ["--data.train", str(case.folder / "train"), str(tmp_path / "other")]
    with pytest.raises(ConfigError, match=f"other: made with the tokenizer {tokenizer.digest[:12]}"):
        main([str(case.toml("refused")), "--steps", "1:1", *words])


@pytest.mark.parametrize("steps", ["0:3", "3:2", "1-2", "", ":4", "-1:2"])
def test_invalid_steps_are_refused(case, steps):
    with pytest.raises(ConfigError, match="expected A:B"):
        main([str(case.toml("steps")), f"--steps={steps}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.weights", "1", "1"], r"data.weights = \[1.0, 1.0\]: give one for each of the 1"),
        (["--data.weights", "0"], "at least one must be a positive number"),
        (["--data.fim-rates", "1.5"], r"1.5 is not between 0 and 1"),
        (["--dp", "3"], "global_batch_size 8: a multiple of the 3"),
        (["--dp", "0"], "dp = 0"),
        (["--data-workers", "-1"], "data_workers = -1"),
    ],
)
def test_mistakes_are_one_line(case, words, message):
    with pytest.raises(ConfigError, match=message):
        main([str(case.toml("mistakes")), "--steps", "1:2", *words])


def test_the_digested_stream_is_the_runs_stream(case, capsys):
    """The command opens the data as training does."""
    config = case.config("same")
    stream = open_stream(config, load_tokenizer(config), dp_rank=0, dp_size=1)
    expected = {str(step): step_digest([stream.next_batch()], first_window=0) for step in range(1, 7)}
    assert digests(case, capsys) == expected
