"""Folders that torch.distributed.checkpoint writes and reads through its Hugging Face storage, without a pickle."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_huggingface import make_model
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.errors import FormatError
from megacoder.model.conversion import export_checkpoint, import_folder
from megacoder.model.huggingface import export_model, import_model, weight_shapes
from megacoder.model.transformer import weight_pieces

PLACEMENTS = {"rows": [Shard(0), Shard(0)], "columns": [Shard(0), Shard(1)], "copies": [Replicate(), Shard(0)]}


def write_sharded(world, folder):
    """What four ranks of torch write: a 2 x 2 mesh, weights cut along rows and columns."""
    mesh = init_device_mesh("cpu", (2, 2))
    model = make_model(vocab_size=96, num_key_value_heads=4, intermediate_size=112)
    export_model(model, folder) if world.rank == 0 else None
    dist.barrier()
    names = list(PLACEMENTS)
    state = {}
    for index, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        placement = PLACEMENTS[names[index % 3]] if tensor.dim() == 2 else [Replicate(), Replicate()]
        state[name] = distribute_tensor(tensor, mesh, placement)
    dist.barrier()
    if world.rank == 0:
        (folder / "model.safetensors").rename(folder.with_suffix(".safetensors"))
    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    dcp.save(state, storage_writer=writer)


@pytest.fixture(scope="module")
def sharded(ranks, tmp_path_factory):
    """(folder, its tensors)."""
    folder = tmp_path_factory.mktemp("dcp") / "model"
    ranks.run(4, write_sharded, folder)
    return folder, load_file(folder.with_suffix(".safetensors"))


def test_a_checkpoint_of_several_torch_ranks_is_imported(sharded, tmp_path):
    folder, tensors = sharded
    assert len(list(folder.glob("shard-*.safetensors"))) == 4
    import_folder(folder, tmp_path / "start")
    reader = CheckpointReader(tmp_path / "start")
    assert {name for _, name in reader.tensors()} == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(reader.read_tensor(name), tensor), name
    for piece in weight_pieces(import_model(folder)):
        assert torch.equal(piece.view, tensors[piece.hf_name]), piece.hf_name


def test_torch_reads_what_we_export(sharded, tmp_path, monkeypatch):
    folder, tensors = sharded
    import_folder(folder, tmp_path / "start")
    reader = CheckpointReader(tmp_path / "start")
    monkeypatch.setattr("megacoder.checkpoint.huggingface._MAX_SHARD_BYTES", 60_000)
    config = export_checkpoint(reader, tmp_path / "hf", dtype=torch.float32, tokenizer_folder=None)
    found = {name: torch.full(shape, float("nan")) for name, shape in weight_shapes(config).items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(path=str(tmp_path / "hf")))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded[0], tmp_path / "copy")


def test_a_missing_shard_is_a_hole_and_named(copy):
    """Where torch's own reader leaves what was there before."""
    sorted(copy.glob("shard-*.safetensors"))[-1].unlink()
    with pytest.raises(FormatError, match=r"copy: .*weight: \[.*\] is in no file"):
        import_model(copy)


def test_a_stale_shard_is_an_overlap_and_named(copy):
    first = sorted(copy.glob("shard-*.safetensors"))[0]
    shutil.copy(first, first.with_name("shard-00009-model-00001-of-00001.safetensors"))
    with pytest.raises(FormatError, match=r"copy: .*weight: \[.*\] is stored twice"):
        import_model(copy)


def rewrite(path, *, metadata=None, change=lambda tensors: tensors):
    save_file(change(load_file(path)), path, metadata=metadata or {})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "does not say where"),
        ({"DCP_SHARDING_INFO": "["}, "does not say where"),
        ({"DCP_SHARDING_INFO": "{}"}, "does not say where"),
        ({"DCP_SHARDING_INFO": json.dumps({"model.norm.weight": {"saved_offsets": ["x"]}})}, "does not say where"),
    ],
)
def test_metadata_without_a_location_is_refused(copy, metadata, message):
    path = sorted(copy.glob("shard-*.safetensors"))[0]
    rewrite(path, metadata=metadata)
    with pytest.raises(FormatError, match=message) as caught:
        import_model(copy)
    assert str(caught.value).startswith(str(path))


def test_a_part_outside_its_tensor_and_a_file_that_is_not_safetensors_are_refused(copy):
    path = sorted(copy.glob("shard-*.safetensors"))[0]
    offsets = {name: {"saved_offsets": [90] * tensor.dim()} for name, tensor in load_file(path).items()}
    rewrite(path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    with pytest.raises(FormatError, match=r"has a part \[90:"):
        import_model(copy)
    path.write_bytes(b"x")
    with pytest.raises(FormatError, match="not readable as safetensors"):
        import_model(copy)


def test_a_tensor_that_the_model_lacks_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(FormatError, match=r"tensor model\.layers\.1.* has no place in the model of config\.json"):
        import_model(copy)


def test_parts_of_several_dtypes_are_refused(copy):
    """They would all become what the first one is."""
    path = sorted(copy.glob("shard-*.safetensors"))[-1]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    rewrite(path, metadata=metadata, change=lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    with pytest.raises(FormatError, match=r"parts of .*weight are stored as BF16 and F32; save it again in one dtype"):
        import_model(copy)


def test_dcps_own_storage_is_refused_with_advice(copy):
    for path in copy.glob("shard-*.safetensors"):
        path.unlink()
    dcp.save({"w": torch.ones(2)}, checkpoint_id=str(copy))
    assert (copy / ".metadata").exists()
    with pytest.raises(FormatError, match="index is a pickle, which can run code, and is not read: save it with"):
        import_model(copy)
