"""Thirty random pairs of layouts, both ways: every rank loads, bit for bit, what the ranks of the other layout saved.

All thirty go through the planner, real files and the code that decides what a rank of a layout holds, with ranks
simulated one after the other; a few are real runs that change their layout halfway and train on. `reshard_parity.py`
does the latter with any number of pairs.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import reshard_parity
import torch
from checkpoint_cases import blank, no_flush, save_as_ranks  # noqa: F401
from layout_parity import BUCKET_ELEMENTS
from reshard_parity import Pair, measure, random_pairs

from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.errors import ConfigError
from megacoder.model.huggingface import weight_shapes
from megacoder.train.reshard import rank_fragments

PAIRS = random_pairs(30, seed=5)
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def fragments_of(case):
    """What each rank of a layout holds, without data."""
    request = case.request()
    parallel = dataclasses.replace(request.parallel, bucket_elements=BUCKET_ELEMENTS)
    layout = request.layout(case.world_size)
    return [rank_fragments(request.model, parallel, layout, rank, KINDS) for rank in range(case.world_size)]


def expected(fragment, tensors):
    """The fragment's elements of the whole tensor."""
    whole = tensors[fragment.kind, fragment.name]
    return whole[fragment.region.inside(Box.whole(whole.shape))].flatten()[fragment.start : fragment.stop]


def filled(fragment, tensors):
    return dataclasses.replace(fragment, data=expected(fragment, tensors).clone())


def test_pairs_follow_the_seed_and_have_many_sizes():
    assert random_pairs(30, seed=5) == PAIRS != random_pairs(30, seed=6)
    assert {case.world_size for pair in PAIRS for case in (pair.first, pair.second)} == set(range(1, 9))
    assert all(Pair.parse(str(pair)) == pair for pair in PAIRS)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_one_layout_reads_another_ones_checkpoint_bit_for_bit(tmp_path, pair):
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(pair.first.request().model)
    tensors = {
        (kind, name): torch.randn(shape, generator=generator) for kind in KINDS for name, shape in shapes.items()
    }
    layouts = [
        [[filled(fragment, tensors) for fragment in fragments] for fragments in fragments_of(case)]
        for case in (pair.first, pair.second)
    ]
    for step, (written, wanted) in enumerate([layouts, layouts[::-1]]):
        reader = CheckpointReader(save_as_ranks(tmp_path, step, written))
        read = 0
        for fragment in (fragment for fragments in wanted for fragment in fragments):
            loaded = blank(fragment)
            reader.read(loaded)
            assert torch.equal(loaded.data, fragment.data), str(fragment)
            read += loaded.data.numel()
        assert read == sum(tensor.numel() for tensor in tensors.values())  # each element by one rank


@pytest.mark.parametrize(
    "text",
    [
        "tp=2,pp=2,dp=2,kv-heads=1,sequences=24 > pp=4,schedule=zbv,cp=2",
        "tp=4,tied=on,bias=on,qk-norm=on,kv-heads=2,vocab=40,sequences=24 > dp=3,pp=2,schedule=interleaved",
    ],
)
def test_a_run_that_changes_its_layout_continues_unchanged(ranks, text):
    pair = Pair.parse(text)
    for way in (pair, pair.reversed):
        report = measure(ranks, way, seed=3)
        assert report.different == 0
        assert report.ok, report


def test_the_tool_prints_json(ranks, monkeypatch, capsys):
    monkeypatch.setattr(reshard_parity, "RankPool", lambda: contextlib.nullcontext(ranks))
    assert reshard_parity.main(["--pairs", "dp=2,sequences=4 > tp=2", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["pair"] for report in reports] == ["dp=2,sequences=4 > tp=2,sequences=4",
                                                      "tp=2,sequences=4 > dp=2,sequences=4"]  # fmt: skip
    assert all(report["ok"] and report["elements"] > 100_000 for report in reports)


def test_the_tool_refuses_invalid_pairs():
    with pytest.raises(ConfigError, match="expected two layouts with > between them"):
        Pair.parse("tp=2")
    assert (
        Path(reshard_parity.__file__).name
        in subprocess.run([sys.executable, reshard_parity.__file__], capture_output=True, text=True, check=False).stderr
    )
