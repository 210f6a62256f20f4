"""Every byte counts: whatever is changed, removed or added, verifying and loading both name the file."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    lay_out,
    make_tensors,
    no_flush,  # noqa: F401
    save_as_ranks,
    sealed,
)

from megacoder.checkpoint import manifest as manifest_module
from megacoder.checkpoint import tensor_file as tensor_file_module
from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CheckpointReader, verify_checkpoint
from megacoder.checkpoint.tensor_file import StoredTensor, write_tensor_file
from megacoder.core.errors import CheckpointError

FIRST, SECOND = "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"


def flat(name, shape, start, stop, data):
    return Fragment(
        name=name, kind="weight", global_shape=shape, region=Box.whole(shape), start=start, stop=stop, data=data
    )


@pytest.fixture
def folder(tmp_path):
    """The example of FORMAT.md."""
    head = torch.arange(12.0)
    ranks = [
        [flat("lm_head.weight", (3, 4), 0, 5, head[:5])],
        [flat("lm_head.weight", (3, 4), 5, 12, head[5:]), flat("model.norm.weight", (2,), 0, 2, torch.ones(2))],
    ]
    folder = save_as_ranks(tmp_path, 1000, ranks, state={"tokens": 4194304})
    assert verify_checkpoint(folder) == []
    return folder


def load_all(folder):
    reader = CheckpointReader(folder)
    for kind, name in reader.tensors():
        reader.read_tensor(name, kind)


def assert_refused(folder, path, message=""):
    """Verifying and loading both say one line that begins with the path at fault."""
    faults = verify_checkpoint(folder)
    assert faults
    assert faults[0].startswith(f"{path}: ")
    assert message in faults[0]
    with pytest.raises(CheckpointError) as caught:
        load_all(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def edit(folder, change):
    """Changes the parsed manifest and seals it again."""
    path = folder / "manifest.json"
    table = json.loads(path.read_bytes())
    del table["sha256"]
    change(table)
    path.write_bytes(sealed(table))


def test_the_formats_example_equals_what_is_written(folder):
    page = Path(manifest_module.__file__).with_name("FORMAT.md").read_text()
    example = page.split("```json\n")[1].split("```")[0]
    assert (folder / "manifest.json").read_text() == example


def test_an_edit_without_effect_is_accepted(folder):
    before = (folder / "manifest.json").read_bytes()
    edit(folder, lambda table: None)
    assert (folder / "manifest.json").read_bytes() == before
    assert verify_checkpoint(folder) == []


@pytest.mark.parametrize("name", ["manifest.json", FIRST, SECOND])
def test_any_flipped_byte_is_found(folder, name):
    path = folder / name
    content = path.read_bytes()
    rng = random.Random(name)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= rng.randint(1, 255)
        path.write_bytes(damaged)
        assert_refused(folder, path)


@pytest.mark.parametrize("name", ["manifest.json", FIRST])
def test_any_truncation_and_any_growth_is_found(folder, name):
    path = folder / name
    content = path.read_bytes()
    for size in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:size])
        assert_refused(folder, path)
    path.write_bytes(content + b"\n")
    assert_refused(folder, path)


@pytest.mark.parametrize("name", ["manifest.json", FIRST, SECOND])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, folder / name, "No such file or directory; the checkpoint is incomplete")


def test_all_bad_files_are_named_at_once(folder):
    (folder / FIRST).unlink()
    (folder / SECOND).write_bytes(b"")
    (folder / "extra").touch()
    faults = verify_checkpoint(folder)
    assert [fault.split(": ")[0] for fault in faults] == [str(folder / name) for name in (FIRST, SECOND, "extra")]
    shutil.rmtree(folder)
    assert_refused(folder, folder / "manifest.json")


@pytest.mark.parametrize("name", ["rank-00002-of-00004.safetensors", ".hidden", "rank-00000-of-00002.json"])
def test_an_extra_file_is_named(folder, name):
    (folder / name).write_bytes((folder / FIRST).read_bytes())
    assert_refused(folder, folder / name, "not part of the checkpoint")


def test_a_stale_file_of_the_same_size_is_named(folder, tmp_path):
    other = tmp_path / "other"
    ranks = [
        [flat("lm_head.weight", (3, 4), 0, 5, torch.zeros(5))],
        [flat("lm_head.weight", (3, 4), 5, 12, torch.zeros(7))],
    ]
    stale = save_as_ranks(other, 1000, ranks) / FIRST
    assert stale.stat().st_size == (folder / FIRST).stat().st_size
    shutil.copy(stale, folder / FIRST)
    assert_refused(folder, folder / FIRST, "wrong CRC-32")


def test_files_that_changed_places_are_named(folder):
    os.rename(folder / FIRST, folder / "x")
    os.rename(folder / SECOND, folder / FIRST)
    os.rename(folder / "x", folder / SECOND)
    assert_refused(folder, folder / FIRST)


def test_a_link_or_folder_instead_of_a_file_is_refused(folder, tmp_path):
    os.rename(folder / FIRST, tmp_path / "elsewhere")
    (folder / FIRST).symlink_to(tmp_path / "elsewhere")
    assert_refused(folder, folder / FIRST, "not a regular file")
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()
    assert_refused(folder, folder / FIRST, "not a regular file")
    manifest = folder / "manifest.json"
    os.rename(manifest, tmp_path / "manifest")
    manifest.symlink_to(tmp_path / "manifest")
    assert_refused(folder, manifest, "not a regular file")


def test_a_file_truncated_after_stat_is_not_mapped(folder, monkeypatch):
    os.truncate(folder / FIRST, 100)
    monkeypatch.setattr(tensor_file_module, "size_fault", lambda path, size: None)
    monkeypatch.setattr("megacoder.checkpoint.folders.size_fault", lambda path, size: None)
    assert_refused(folder, folder / FIRST, "cannot be mapped")


def test_a_checkpoint_under_another_steps_name_is_refused(folder):
    renamed = folder.rename(folder.with_name("step-00002000"))
    assert_refused(renamed, renamed / "manifest.json", "of step 1000")


def piece(table, index=0):
    return table["tensors"]["weight"]["lm_head.weight"]["pieces"][index]


def nested(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return {"x": value[0]}


def rename_file(table, name):
    table["files"][name] = table["files"].pop(FIRST)
    for index in (0, 1):
        piece(table, index)["file"] = name


EDITS = {
    "format": (lambda table: table.update(format="torch"), "format 'torch'"),
    "version": (lambda table: table.update(version=2), "version 2 of the format; this megacoder reads version 1"),
    "step": (lambda table: table.update(step=-1), "step = -1: expected a non-negative integer"),
    "step type": (lambda table: table.update(step=True), "step = True"),
    "layout": (lambda table: table.update(layout=[]), "layout = []: expected dict"),
    "state": (lambda table: table.update(state=None), "state = None: expected dict"),
    "deep layout": (lambda table: table.update(layout=nested(65)), "layout: nested more than 64 levels deep"),
    "deep state": (lambda table: table.update(state=nested(500)), "state: nested more than 64 levels deep"),
    "block size": (lambda table: table.update(block_size=1024), "block_size 1024, expected 16777216"),
    "a member more": (lambda table: table.update(extra=1), "members ["),
    "a member less": (lambda table: table.pop("layout"), "members ["),
    "files": (lambda table: table.update(files=[]), "files = []: expected dict"),
    "out": (lambda table: rename_file(table, "../x.safetensors"), "'../x.safetensors': not a plain name"),
    "absolute": (lambda table: rename_file(table, "/etc/x.safetensors"), "'/etc/x.safetensors': not a plain name"),
    "below": (lambda table: rename_file(table, "a/x.safetensors"), "'a/x.safetensors': not a plain name"),
    "hidden": (lambda table: rename_file(table, ".x.safetensors"), "'.x.safetensors': not a plain name"),
    "backslash": (lambda table: rename_file(table, "..\\x.safetensors"), "not a plain name"),
    "other kind of file": (lambda table: rename_file(table, "x.pt"), "'x.pt': not a plain name"),
    "size type": (lambda table: table["files"][FIRST].update(size=1.5), "size of file rank-00000"),
    "checksums": (lambda table: table["files"][FIRST].update(crc32=[]), "0 checksums for"),
    "file member": (lambda table: table["files"][FIRST].pop("size"), "expected the members size, crc32"),
    "kind": (lambda table: table["tensors"].update(weight=3), "weight = 3: expected dict"),
    "dtype": (lambda table: table["tensors"]["weight"]["lm_head.weight"].update(dtype="F8"), "dtype 'F8'"),
    "shape": (lambda table: table["tensors"]["weight"]["lm_head.weight"].update(shape=[3]), "not a box in shape [3]"),
    "offsets": (lambda table: piece(table).update(offsets=[2, 1]), "offsets (2, 1) and sizes (1, 4) are not a box"),
    "negative": (lambda table: piece(table).update(offsets=[-1, 0]), "= -1: expected a non-negative integer"),
    "empty box": (lambda table: piece(table).update(sizes=[0, 4]), "are not a box"),
    "ranks differ": (lambda table: piece(table).update(sizes=[4]), "are not a box"),
    "unlisted file": (lambda table: piece(table).update(file="y.safetensors"), "'y.safetensors', which is not listed"),
    "key twice": (lambda table: piece(table, 1).update(key=piece(table)["key"]), "is used twice"),
    "a hole": (lambda table: table["tensors"]["weight"]["model.norm.weight"].update(shape=[3]), "norm.weight: [2:3]"),
    "moved": (lambda table: piece(table).update(offsets=[2, 0]), "weight of lm_head.weight: [0:1, 0:4]"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_was_sealed_wrong_is_refused(folder, name):
    change, message = EDITS[name]
    edit(folder, change)
    assert_refused(folder, folder / "manifest.json", message)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: piece(table).update(key="weight/other/0"),
        lambda table: (
            piece(table).update(key="weight/lm_head.weight/1"),
            piece(table, 1).update(key="weight/lm_head.weight/0"),
        ),
        lambda table: table["tensors"]["weight"]["lm_head.weight"].update(dtype="I32"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_names_the_file(folder, change):
    edit(folder, change)
    assert_refused(folder, folder / FIRST, "is not the tensor that the manifest describes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 8 + b"{}", "its header would be"),
        ((2).to_bytes(8, "little") + b"{]", "its header does not parse"),
        ((2).to_bytes(8, "little") + b"[]", "its header does not parse"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "its header does not parse"),
        ((14).to_bytes(8, "little") + b'{"a":{"b":[]}}', "its header does not parse"),
        (b"abc", "its header would be"),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused_even_with_the_right_checksum(folder, content, message):
    (folder / FIRST).write_bytes(content)
    sums = {"size": len(content), "crc32": [tensor_file_module.zlib.crc32(content)]}
    edit(folder, lambda table: table["files"].update({FIRST: sums}))
    assert_refused(folder, folder / FIRST, message)


def test_data_outside_the_file_is_refused(folder):
    path = folder / SECOND
    content = path.read_bytes()
    damaged = content.replace(b'"data_offsets":[28,36]', b'"data_offsets":[68,76]')
    assert damaged != content
    path.write_bytes(damaged)
    sums = {"size": len(damaged), "crc32": [tensor_file_module.zlib.crc32(damaged)]}
    edit(folder, lambda table: table["files"].update({SECOND: sums}))
    assert_refused(folder, path, "lies outside the file")


def test_only_blocks_that_are_read_are_checked_and_each_of_them_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file_module, "BLOCK_SIZE", 64)
    monkeypatch.setattr(manifest_module, "BLOCK_SIZE", 64)
    tensors = make_tensors({"a": (40, 8), "b": (40, 8)}, kinds=("weight",))
    folder = save_as_ranks(tmp_path, 1, lay_out(tensors, tp=1, dp=1, random=random.Random(0)))
    path = folder / "rank-00000-of-00001.safetensors"
    content = path.read_bytes()
    data = len(content) - 2 * 40 * 8 * 4
    assert verify_checkpoint(folder) == []
    assert torch.equal(CheckpointReader(folder).read_tensor("b"), tensors["weight", "b"])
    damaged = bytearray(content)
    damaged[data + 20 * 32] ^= 1  # the first element of row 20 of a
    path.write_bytes(damaged)
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read_tensor("b"), tensors["weight", "b"])
    for row in range(40):
        fragment = flat("a", (40, 8), row * 8, row * 8 + 8, torch.empty(8))
        begin = data + row * 32
        damaged_block = (data + 20 * 32) // 64
        if damaged_block in (begin // 64, (begin + 31) // 64):
            with pytest.raises(CheckpointError, match="wrong CRC-32"):
                reader.read(fragment)
        else:
            reader.read(fragment)
            assert torch.equal(fragment.data, tensors["weight", "a"][row])
    with pytest.raises(CheckpointError, match="wrong CRC-32"):
        reader.read_tensor("a")
    assert len(reader.verify()) == 1


def test_data_is_cut_into_blocks_for_any_chunks_of_input(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file_module, "BLOCK_SIZE", 32)
    data = bytes(range(200))
    tensor = [StoredTensor("t", "U8", (200,))]
    expected = write_tensor_file(tmp_path / "one", tensor, [memoryview(data)])
    pieces = [memoryview(data)[begin : begin + 7] for begin in range(0, 200, 7)]
    assert write_tensor_file(tmp_path / "many", tensor, pieces) == expected
    content = (tmp_path / "one").read_bytes()
    assert (tmp_path / "many").read_bytes() == content
    assert expected.size == len(content)
    blocks = [content[begin : begin + 32] for begin in range(0, len(content), 32)]
    assert expected.crc32 == tuple(map(tensor_file_module.zlib.crc32, blocks))
    with pytest.raises(ValueError, match="199 bytes of data for tensors of 200"):
        write_tensor_file(tmp_path / "short", tensor, [memoryview(data)[1:]])
    with pytest.raises(FileExistsError):
        write_tensor_file(tmp_path / "one", tensor, [memoryview(data)])


def test_a_dtype_that_is_not_stored_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"torch.complex64 cannot be stored; use one of F64"):
        save_as_ranks(tmp_path, 1, [[flat("w", (2,), 0, 2, torch.zeros(2, dtype=torch.complex64))]])
