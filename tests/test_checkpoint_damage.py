"""Damage to a checkpoint as four ranks of a real layout write it: every byte counts, and no file is run as code.

`test_checkpoint_format.py` does the same for every byte of a checkpoint of two tensors.
"""

import builtins
import json
import os
import pickle
import random
import re
import sys
import zipfile

import pytest
import torch
from checkpoint_cases import no_flush, save_as_ranks, sealed  # noqa: F401
from layout_parity import Case
from test_reshard import KINDS, filled, fragments_of

from megacoder.checkpoint.reader import CheckpointReader, verify_checkpoint
from megacoder.cli.main import main
from megacoder.core.config import to_dict
from megacoder.core.errors import CheckpointError, MegacoderError
from megacoder.model.huggingface import import_model, weight_shapes

NUM_FLIPS = 200
SEAL = len('"sha256":""}\n') + 64


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(CASE.request().model)
    return {(kind, name): torch.randn(shape, generator=generator) for kind in KINDS for name, shape in shapes.items()}


CASE = Case(tp=2, pp=2, layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tensors):
    ranks = [[filled(fragment, tensors) for fragment in fragments] for fragments in fragments_of(CASE)]
    config = {"model": to_dict(CASE.request().model)}
    state = {"num_updates": 7, "position": {"cursor": [1, 2**40]}, "config": config}
    folder = save_as_ranks(tmp_path_factory.mktemp("damage"), 12, ranks, state=state)
    assert verify_checkpoint(folder) == []
    return folder


def load(folder, tensors):
    """Reads all; an element that is not what was written is the one thing that must never be."""
    reader = CheckpointReader(folder)
    for (kind, name), tensor in tensors.items():
        assert torch.equal(reader.read_tensor(name, kind), tensor), "wrong values were loaded"


def assert_named(folder, tensors, path):
    faults = verify_checkpoint(folder)
    assert [fault for fault in faults if fault.startswith(f"{path}: ")], faults
    with pytest.raises(CheckpointError) as caught:
        load(folder, tensors)
    assert str(caught.value).startswith(f"{path}: "), str(caught.value)


def test_verifying_and_loading_name_two_hundred_random_flips(folder, tensors):
    rng = random.Random(0)
    paths = sorted(folder.iterdir())
    sizes = [path.stat().st_size for path in paths]
    hit = set()
    for _ in range(NUM_FLIPS):
        path = rng.choices(paths, weights=sizes)[0]  # every byte of the checkpoint alike
        hit.add(path.name)
        position, change = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ change]))
            file.flush()
            try:
                assert_named(folder, tensors, path)
            finally:
                file.seek(position)
                file.write(bytes([byte]))
    assert len(hit) == len(paths) == 5
    load(folder, tensors)


def leaves(value, path=()):
    """(path, value) of every number and string of a JSON value, and of every empty list or object."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def changed(table, path, value):
    """A copy with another value at `path`."""
    copy = json.loads(json.dumps(table))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value + 1 if isinstance(value, int) else f"{value}x" if isinstance(value, str) else None
    return copy


def test_each_field_of_the_manifest_counts(folder, tensors):
    """Of fields that there are many of alike, the first few. Once sealed again, so that not the seal alone notices."""
    path = folder / "manifest.json"
    content = path.read_bytes()
    table = json.loads(content)
    del table["sha256"]
    assert sealed(table) == content
    kinds: dict[str, int] = {}
    try:
        for place, value in leaves(table):
            kind = "/".join("#" if isinstance(key, int) else str(key) for key in place)
            kind = re.sub(r"(model|lm_head)[^/]*weight|rank-[^/]*", "*", kind)
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] > 3 or place[0] in ("layout", "state"):  # those two are the run's own
                continue
            path.write_bytes(sealed(changed(table, place, value)))
            faults = verify_checkpoint(folder)
            assert faults, place
            assert all(fault.startswith(str(folder)) for fault in faults), faults
            with pytest.raises(CheckpointError):
                load(folder, tensors)
            path.write_bytes(sealed(changed(table, place, value))[:-SEAL] + content[-SEAL:])
            assert_named(folder, tensors, path)
    finally:
        path.write_bytes(content)
    assert {"format", "version", "step", "block_size", "files/*/size", "files/*/crc32/#"} < set(kinds)
    assert {f"tensors/{kind}/*/pieces/#/{field}" for kind in KINDS for field in ("file", "key")} < set(kinds)
    load(folder, tensors)


# Files that are code


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return builtins.open, (self.path, "w")


def attack_files(marker):
    """Name -> content: pickles, bare and as torch and NumPy store them."""
    bare = pickle.dumps(Opens(marker))
    yield "pickle", bare
    yield "numpy", b"\x93NUMPY\x01\x00" + (64).to_bytes(2, "little") + (
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(63) + b"\n" + bare
    )  # fmt: skip


@pytest.mark.parametrize("form", ["pickle", "numpy", "torch"])
def test_a_file_that_is_code_is_never_run(folder, tmp_path, capsys, form):
    marker = tmp_path / "ran"
    contents = dict(attack_files(marker))
    if form == "torch":
        with zipfile.ZipFile(tmp_path / "t", "w") as archive:
            archive.writestr("archive/data.pkl", contents["pickle"])
            archive.writestr("archive/version", "3\n")
        contents["torch"] = (tmp_path / "t").read_bytes()
    content = contents[form]
    attacked = tmp_path / "step-00000012"
    attacked.mkdir()
    names = [path.name for path in folder.iterdir()]
    for victim in [*names, ".metadata", "optimizer.pt"]:
        for name in names:
            (attacked / name).write_bytes((folder / name).read_bytes())
        (attacked / victim).write_bytes(content)
        for words in (["verify", attacked], ["inspect", attacked], ["export", attacked, tmp_path / "hf"],
                      ["reshard", attacked, tmp_path / "new"]):  # fmt: skip
            with pytest.raises(SystemExit):
                main(["checkpoint", *map(str, words)])
        assert str(attacked / victim) in capsys.readouterr().err
        os.unlink(attacked / victim)
    for victim in ("model.safetensors", "config.json", "pytorch_model.bin", "tokenizer.json", ".metadata"):
        model = tmp_path / f"hf-{victim}"
        model.mkdir()
        (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (model / victim).write_bytes(content)
        with pytest.raises(MegacoderError):
            import_model(model)
    assert not marker.exists()


def test_the_attack_would_work(tmp_path, unpickled):
    pickle.loads(dict(attack_files(tmp_path / "ran"))["pickle"]).close()
    assert (tmp_path / "ran").exists()
    assert unpickled in (["io.open"], ["_io.open"])  # where Python says that `open` is from


@pytest.fixture
def unpickled():
    """Names of what anything in this process unpickles during the test, as Python's own audit reports it."""
    names = []
    if not hasattr(sys, "_unpickled"):  # a hook stays for the life of the process
        sys._unpickled = [names]
        sys.addaudithook(
            lambda event, args: event == "pickle.find_class" and sys._unpickled[0].append(f"{args[0]}.{args[1]}")
        )
    sys._unpickled[0] = names
    yield names
    sys._unpickled[0] = []


def test_nothing_is_unpickled_from_reading_to_export(folder, tmp_path, unpickled):
    for words in (
        ["verify", folder], ["inspect", folder], ["reshard", folder, tmp_path / "new", "--dp", 2],
        ["export", tmp_path / "new", tmp_path / "hf"], ["import", tmp_path / "hf", tmp_path / "start"],
    ):  # fmt: skip
        main(["checkpoint", *map(str, words)])
    assert CheckpointReader(tmp_path / "start").step == 0
    assert unpickled == []
