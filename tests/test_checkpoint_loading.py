"""Any layout to any layout, and every way in which a load must fail instead of giving wrong values."""

import random

import pytest
import torch
from checkpoint_cases import (  # noqa: F401
    ALONE,
    SHAPES,
    blank,
    lay_out,
    make_tensors,
    no_flush,
    save_as_ranks,
    whole_fragments,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megacoder.checkpoint import folders
from megacoder.checkpoint import reader as reader_module
from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.folders import open_checkpoint, rotate
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.checkpoint.writer import CheckpointConfig, CheckpointWriter
from megacoder.core.errors import CheckpointError

sizes = st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    written=st.tuples(sizes, sizes), wanted=st.tuples(sizes, sizes), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_layout_loads_in_any_layout(tmp_path_factory, shape, written, wanted, seed):
    rng = random.Random(seed)
    tensors = make_tensors({"w": shape, **SHAPES}, seed)
    root = tmp_path_factory.mktemp("run")
    save_as_ranks(root, 10, lay_out(tensors, tp=written[0], dp=written[1], random=rng))
    reader = CheckpointReader(root)
    assert reader.tensors().keys() == tensors.keys()
    for fragments in lay_out(tensors, tp=wanted[0], dp=wanted[1], random=rng):
        empty = [blank(fragment) for fragment in fragments]
        reader.read_all(empty)
        for got, expected in zip(empty, fragments, strict=True):
            assert torch.equal(got.data, expected.data)
    for (kind, name), tensor in tensors.items():
        assert torch.equal(reader.read_tensor(name, kind), tensor)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
              torch.bool],
)  # fmt: skip
def test_dtypes_come_back_bit_for_bit_and_next_to_each_other(tmp_path, dtype):
    narrow = torch.arange(3).to(torch.uint8)  # would leave the next tensor unaligned if it came first
    tensors = {("weight", "narrow"): narrow, ("weight", "w"): torch.randn(5, 3).mul(10).to(dtype)}
    save_as_ranks(tmp_path, 1, lay_out(tensors, tp=2, dp=2, random=random.Random(0)))
    loaded = CheckpointReader(tmp_path).read_tensor("w")
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensors["weight", "w"])


def test_nan_payloads_and_signed_zeros_survive(tmp_path):
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800001, 1], dtype=torch.int32)
    save_as_ranks(tmp_path, 1, [whole_fragments({("weight", "w"): bits.view(torch.float32)})])
    assert torch.equal(CheckpointReader(tmp_path).read_tensor("w").view(torch.int32), bits)


def test_the_safetensors_library_reads_our_files(tmp_path):
    tensors = make_tensors()
    folder = save_as_ranks(tmp_path, 1, [*lay_out(tensors, tp=1, dp=2, random=random.Random(1)), []])
    pieces = {}
    for path in sorted(folder.glob("*.safetensors")):
        pieces[path.name] = load_file(path)
    assert pieces["rank-00002-of-00003.safetensors"] == {}
    for (kind, name), entry in CheckpointReader(folder).tensors().items():
        joined = torch.full(entry.shape, float("nan"))
        for piece in entry.pieces:
            assert piece.key.startswith(f"{kind}/{name}/")
            joined[piece.box.inside(Box.whole(entry.shape))] = pieces[piece.file][piece.key]
        assert torch.equal(joined, tensors[kind, name])


def test_step_state_and_layout_come_back(tmp_path):
    state = {
        "data": {"cursor": 2**60, "epoch": 0},
        "skipped": [3, 5],
        "lr": 4.2e-4,
        "note": "fim ▁ \u2028",
        "none": None,
    }
    writer = CheckpointWriter(tmp_path, ALONE, CheckpointConfig())
    writer.save(123456789, [], state=state, layout={"tp": 1})
    writer.wait()
    reader = CheckpointReader(tmp_path)
    assert (reader.step, reader.state, reader.layout) == (123456789, state, {"tp": 1})


def test_few_files_mapped_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "_MOST_MAPPED", 2)
    tensors = make_tensors()
    save_as_ranks(tmp_path, 1, lay_out(tensors, tp=2, dp=3, random=random.Random(2)))
    reader = CheckpointReader(tmp_path)
    for (kind, name), tensor in tensors.items():
        assert torch.equal(reader.read_tensor(name, kind), tensor)
    assert len(reader._mapped) == 2


def fragment(name="matrix", kind="weight", shape=(9, 5), dtype=torch.float32):
    volume = Box.whole(shape).volume
    return Fragment(
        name=name, kind=kind, global_shape=shape, region=Box.whole(shape), start=0, stop=volume,
        data=torch.zeros(volume, dtype=dtype),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "matrx"}, "no weight of matrx .did you mean 'matrix'"),
        ({"kind": "momentum"}, "no momentum of matrix; it has 0 tensors of kind 'momentum'"),
        ({"shape": (5, 9)}, r"has shape \[9, 5\]; the model needs \[5, 9\]"),
        ({"dtype": torch.bfloat16}, "stored as F32; requested as BF16"),
    ],
)
def test_a_missing_or_different_tensor_is_named(tmp_path, asked, message):
    save_as_ranks(tmp_path, 1, [whole_fragments(make_tensors())])
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path).read(fragment(**asked))


@pytest.mark.parametrize(
    "wrong",
    [
        {"region": Box((0, 0), (10, 5))},
        {"stop": 46},
        {"start": 3},
        {"data": torch.zeros(5, 9)},
        {"data": torch.zeros(90)[::2]},
    ],
)
def test_a_fragment_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError, match="weight of matrix"):
        Fragment(**{**vars(fragment()), **wrong})


def test_an_explicit_path_wins_over_latest(tmp_path):
    tensors = make_tensors()
    for step in (1, 2):
        save_as_ranks(tmp_path, step, [whole_fragments(tensors)])
    assert CheckpointReader(tmp_path).step == 2
    assert CheckpointReader(tmp_path / "step-00000001").step == 1
    (tmp_path / "step-00000001").rename(tmp_path / "release")
    assert CheckpointReader(tmp_path / "release").step == 1


@pytest.mark.parametrize(
    "latest", ["step-00000001", "step-00000002", "step-00000003", "step-00000009", "../elsewhere", "/etc", "", None]
)
def test_the_newest_complete_checkpoint_is_used_and_reported_whatever_latest_says(tmp_path, latest, capsys):
    tensors = make_tensors()
    for step in (1, 2, 3):
        save_as_ranks(tmp_path, step, [whole_fragments(tensors)])
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    if latest is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(latest + "\n")
    assert CheckpointReader(tmp_path).step == 2
    said = capsys.readouterr().err
    assert "skipping step-00000003" in said
    named = f"latest names {latest!r}; using step-00000002, which is the newest complete checkpoint"
    assert (named in said) == (latest not in (None, "step-00000002"))


def test_a_missing_checkpoint_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder of checkpoints"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000004/manifest.json: No such file"):
        CheckpointReader(tmp_path / "step-00000004")


def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_not_called_damaged(tmp_path):
    for step in (10, 20):
        save_as_ranks(tmp_path, step, lay_out(make_tensors(), tp=1, dp=2, random=random.Random(0)))
    reader = CheckpointReader(tmp_path / "step-00000010")
    rotate(tmp_path, step=20, keep_last=1, keep_every=None)
    with pytest.raises(CheckpointError, match=r"step-00000010: was removed while it was read.*name a newer one"):
        reader.read_tensor("matrix")


def test_checkpoints_that_a_run_replaces_while_they_are_looked_for_are_found(tmp_path, monkeypatch):
    def save(step):
        save_as_ranks(tmp_path, step, lay_out(make_tensors(), tp=1, dp=2, random=random.Random(0)))

    def open_late(folder):
        if folder.name == "step-00000010":
            save(20)
            rotate(tmp_path, step=20, keep_last=1, keep_every=None)
        return open_checkpoint(folder)

    save(10)
    monkeypatch.setattr(folders, "open_checkpoint", open_late)
    assert CheckpointReader(tmp_path).step == 20
