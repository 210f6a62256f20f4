"""`megacoder checkpoint reshard`, `export` and `import`: the output equals the input and can be trained on."""

import dataclasses
import json
import os
import shutil
import time

import pytest
import tokenizers
import torch
from checkpoint_cases import flip_a_byte, no_flush, no_space, state_of  # noqa: F401
from command_line import refusal, run_command
from safetensors.torch import load_file, save_file
from tiny_models import init_with_biases, make_model
from train_cases import ALONE, changed, leave, make_case

from megacoder.checkpoint import folders
from megacoder.checkpoint import reader as reader_module
from megacoder.checkpoint.offline import write_offline
from megacoder.checkpoint.reader import CheckpointReader, verify_checkpoint
from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import load_model
from megacoder.core.config import load_toml
from megacoder.core.errors import CheckpointError, ConfigError
from megacoder.model.huggingface import export_model, import_model
from megacoder.model.transformer import Transformer
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.rope_scaling import RopeScaling
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.tensor import TensorParallel
from megacoder.train.config import RunConfig
from megacoder.train.loop import Trainer
from megacoder.train.resuming import open_start


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """With `run`, two steps of a model of five layers."""
    case = make_case(tmp_path_factory.mktemp("convert"))
    Trainer(config_of(case, "run"), ALONE).run()
    return case


def config_of(case, output, **changes):
    model = {"num_hidden_layers": 5, **changes.pop("model", {})}
    return case.config(output, **{"steps": 2, "checkpoint_every": 2, "model": model, **changes})


def run(capsys, *words):
    return run_command(capsys, "checkpoint", *words)


def refused(capsys, *words, code=1):
    """What a conversion says that wrote nothing."""
    said = refusal(capsys, "checkpoint", *words, code=code)
    assert not words[2].exists()
    return said


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def save_as_is(world, config, source):
    """What a run in the layout of `config` writes, right after it has read `source`."""
    shutil.copytree(source, config.output / "checkpoints", dirs_exist_ok=True) if world.is_first else None
    torch.distributed.barrier()
    leave(Trainer(config, world))


@pytest.mark.parametrize(
    ("axes", "size"), [({"tp": 2, "pp": 2, "dp": 2}, 8), ({"tp": 4}, 4), ({"pp": 4}, 4), ({"cp": 2, "dp": 2}, 4)]
)
def test_resharded_files_equal_those_of_a_run_in_that_layout(ranks, case, capsys, axes, size):
    name = "-".join(f"{axis}{number}" for axis, number in axes.items())
    words = [word for axis, number in axes.items() for word in (f"--{axis}", number)]
    code, _, err = run(capsys, "reshard", case.folder / "run", case.folder / f"{name}-offline", *words)
    assert (code, err.count("\n")) == (0, 1)
    offline = case.folder / f"{name}-offline" / "step-00000002"
    assert verify_checkpoint(offline) == []
    config = config_of(case, f"{name}-run", parallel=ParallelConfig(**axes))
    ranks.run(size, save_as_is, config, case.folder / "run" / "checkpoints")
    online = config.output / "checkpoints" / "step-00000002"
    files = sorted(path.name for path in online.glob("*.safetensors"))
    assert len(files) == size
    assert sorted(os.listdir(offline)) == ["manifest.json", *files]
    for file in files:
        assert (offline / file).read_bytes() == (online / file).read_bytes(), file


def test_resharding_keeps_a_runs_buckets_and_placement(ranks, case, capsys):
    parallel = ParallelConfig(pp=2, dp=2, layers_per_stage=(1, 4), bucket_elements=1000)
    config = config_of(case, "placed", parallel=parallel)
    ranks.run(4, save_as_is, config, case.folder / "run" / "checkpoints")
    assert run(capsys, "reshard", config.output, case.folder / "placed-offline", "--pp", 2, "--dp", 2)[0] == 0
    for file in (config.output / "checkpoints" / "step-00000002").glob("*.safetensors"):
        assert (case.folder / "placed-offline" / "step-00000002" / file.name).read_bytes() == file.read_bytes(), file


def test_an_imported_model_is_resharded_too(folder, tmp_path, capsys):
    assert run(capsys, "import", folder, tmp_path / "start")[0] == 0
    assert run(capsys, "reshard", tmp_path / "start", tmp_path / "many", "--tp", 2, "--pp", 2, "--dp", 2)[0] == 0
    assert_equal(state_of(tmp_path / "many"), state_of(tmp_path / "start"))
    assert verify_checkpoint(tmp_path / "many" / "step-00000000") == []


def test_there_and_back_in_one_file(case, capsys, tmp_path):
    before = case.folder / "run" / "checkpoints" / "step-00000002"
    assert run(capsys, "reshard", before, tmp_path / "many", "--tp", 2, "--pp", 2)[0] == 0
    assert_equal(state_of(tmp_path / "many"), state_of(before))
    code, _, err = run(capsys, "reshard", tmp_path / "many", tmp_path / "one")
    assert (code, err) == (0, f"{tmp_path / 'one' / 'step-00000002'}: step 2 for dp=1, 1 file\n")
    for name in sorted(os.listdir(before)):
        expected = (before / name).read_bytes()
        if name == "manifest.json":  # of the layout, dp was filled in
            assert CheckpointReader(tmp_path / "one").state == CheckpointReader(before).state
        else:
            assert (tmp_path / "one" / "step-00000002" / name).read_bytes() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "3"], "tp = 3: model.num_attention_heads = 4 is not a multiple of 3; nearest"),
        (["--pp", "8"], "8 stages for 5 layers"),
        (["--dp", "0"], "dp = 0: must be at least 1"),
    ],
)
def test_a_layout_that_cannot_work_writes_nothing(case, capsys, tmp_path, words, message):
    assert message in refused(capsys, "reshard", case.folder / "run", tmp_path / "new", *words, code=2)


def test_a_checkpoint_is_never_written_over(case, capsys, tmp_path):
    for there in (case.folder / "run" / "checkpoints", case.folder / "run"):
        code, _, err = run(capsys, "reshard", case.folder / "run", there)
        assert code == 2
        assert "choose another folder" in err
    assert not list((case.folder / "run").glob("step-*"))
    assert run(capsys, "reshard", case.folder / "run", tmp_path)[0] == 0
    assert "step-00000002 exists already" in run(capsys, "reshard", case.folder / "run", tmp_path, "--tp", 2)[2]
    assert verify_checkpoint(tmp_path / "step-00000002") == []


def test_a_damaged_source_makes_no_checkpoint(case, capsys, tmp_path):
    source = shutil.copytree(case.folder / "run" / "checkpoints", tmp_path / "checkpoints")
    path = source / "step-00000002" / "rank-00000-of-00001.safetensors"
    flip_a_byte(path)
    for words in (["reshard", source, tmp_path / "new", "--tp", 2], ["export", source, tmp_path / "new"]):
        assert f"{path}: bytes 0 to" in refused(capsys, *words)


def test_a_full_disk_is_one_line_and_leaves_nothing(case, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.write", no_space)
    assert "No space left on device" in refused(capsys, "reshard", case.folder / "run", tmp_path / "new")


# Hugging Face


@pytest.fixture
def folder(case, tmp_path, request):
    """A Hugging Face folder in bf16 and two shards, as others publish them; a test's parameter changes the model."""
    changes = {"rope_theta": 100000.0, "rope_factor": 4.0} | getattr(request, "param", {})
    model = Transformer(dataclasses.replace(config_of(case, "x").model, **changes)).to(torch.bfloat16)
    init_with_biases(model, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacoder.checkpoint.huggingface._MAX_SHARD_BYTES", 60_000)
        export_model(model, tmp_path / "hf", tokenizer_folder=case.folder / "tokenizer")
    return tmp_path / "hf"


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_import_then_export_changes_no_byte(folder, tmp_path, capsys):
    assert len(list(folder.glob("*.safetensors"))) > 1
    code, _, err = run(capsys, "import", folder, tmp_path / "start")
    assert (code, err.count("\n")) == (0, 1)
    assert verify_checkpoint(tmp_path / "start" / "checkpoints" / "step-00000000") == []
    code, _, err = run(capsys, "export", tmp_path / "start", tmp_path / "again")
    assert code == 0, err
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text(), name
    assert run(capsys, "export", tmp_path / "start", tmp_path / "wide", "--dtype", "fp32")[0] == 0
    for name, tensor in tensors_of(tmp_path / "wide").items():
        assert torch.equal(tensor, before[name].float()), name


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("more", ["qkv_bias", "qk_norm"])
def test_a_qwen_through_another_layout_changes_no_byte(case, tmp_path, capsys, more, kv_heads):
    config = dataclasses.replace(config_of(case, "x").model, num_key_value_heads=kv_heads, **{more: True})
    export_model(make_model(config), tmp_path / "hf", tokenizer_folder=case.folder / "tokenizer")
    assert run(capsys, "import", tmp_path / "hf", tmp_path / "start")[0] == 0
    assert run(capsys, "reshard", tmp_path / "start", tmp_path / "two", "--tp", 2)[0] == 0
    words = ("--tokenizer", case.folder / "tokenizer", "--dtype", "fp32")
    assert run(capsys, "export", tmp_path / "two", tmp_path / "again", *words)[0] == 0
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(tmp_path / "hf"))
    for path in (tmp_path / "hf").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    code, _, said = run(capsys, "export", tmp_path / "two", tmp_path / "bare")
    assert (code, "no tokenizer: give one with --tokenizer" in said) == (0, True)
    is_qwen2 = json.loads((tmp_path / "bare" / "config.json").read_text())["model_type"] == "qwen2"
    assert ("transformers gives any that is put there later Qwen's splits" in said) == is_qwen2 == (more == "qkv_bias")


def test_all_files_of_a_tokenizer_are_imported(folder, tmp_path, capsys):
    beside = {"chat_template.jinja": "{{ 1 }}", "special_tokens_map.json": "{}", "added_tokens.json": '{"x": 1}'}
    for name, text in beside.items():
        (folder / name).write_text(text)
    assert run(capsys, "import", folder, tmp_path / "start")[0] == 0
    assert {name: (tmp_path / "start" / "tokenizer" / name).read_text() for name in beside} == beside


@pytest.mark.parametrize("folder", [{}, {"qk_norm": True}], indirect=True, ids=["a Llama", "a Qwen3"])
def test_an_imported_model_is_trained_on(folder, case, tmp_path, capsys, monkeypatch):
    assert run(capsys, "import", folder, tmp_path / "start")[0] == 0
    config = load_toml(RunConfig, tmp_path / "start" / "train.toml")
    assert config.warmup_steps < config.steps
    assert (config.init_from, config.data.tokenizer) == (tmp_path / "start", tmp_path / "start" / "tokenizer")
    small = config_of(case, "unused")
    config = dataclasses.replace(
        small, output=tmp_path / "run", init_from=config.init_from, model=config.model, seed=99, steps=1,
        data=dataclasses.replace(small.data, tokenizer=config.data.tokenizer),
    )  # fmt: skip
    trainer = Trainer(config, ALONE)
    expected = import_model(folder).float().state_dict()
    for name, value in trainer.engine.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert "step 0" in capsys.readouterr().err
    trainer.run()
    assert CheckpointReader(tmp_path / "run").step == 1
    shutil.rmtree(tmp_path / "start" / "checkpoints")  # a run that goes on needs it no more
    assert Trainer(config, ALONE).step == 1


def start(world, config):
    leave(Trainer(config, world))


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_run_starts_from_another_in_any_layout_with_fresh_moments_or_those(ranks, case, with_optimizer):
    config = config_of(
        case, f"from-{with_optimizer}", init_from=case.folder / "run", init_optimizer=with_optimizer,
        parallel=ParallelConfig(tp=2, pp=2), global_batch_size=4, optimizer=AdamWConfig(weight_decay=0.0),
    )  # fmt: skip
    ranks.run(4, start, config)
    found, expected = state_of(config.output), state_of(case.folder / "run")
    assert found.keys() == expected.keys()
    for (kind, name), tensor in found.items():
        kept = with_optimizer or kind == "weight"
        assert torch.equal(tensor, expected[kind, name] if kept else torch.zeros_like(tensor)), name
    reader = CheckpointReader(config.output)
    assert (reader.step, reader.state["num_updates"]) == (0, 2 if with_optimizer else 0)
    assert reader.state["data"]["windows"] == 0


def test_an_optimizer_needs_a_checkpoint_with_moments(folder, case, tmp_path, capsys):
    with pytest.raises(ConfigError, match="init_optimizer = true without init_from, which names the run whose"):
        config_of(case, "none", init_optimizer=True)
    assert run(capsys, "import", folder, tmp_path / "start")[0] == 0
    start = load_toml(RunConfig, tmp_path / "start" / "train.toml")
    config = dataclasses.replace(
        config_of(case, "weights-alone"), model=start.model, init_from=start.init_from, init_optimizer=True
    )
    with pytest.raises(ConfigError, match=r"step-00000000 holds weights alone, without AdamW's moments; leave it out"):
        Trainer(config, ALONE)
    assert not config.output.exists()


def load_while_a_run_saves(world, source, config, loads):
    """A weight that this rank loads from `source`, where the next checkpoint appears between two ranks' looks."""
    ready, published = (source / folder / "step-00000007" for folder in ("prepared", "checkpoints"))

    def find_then_publish(path):
        found = folders.find_checkpoint(path)
        if ready.exists():
            ready.rename(published)
        return found

    def find_when_published(path):
        while not published.exists():
            time.sleep(0.01)
        return folders.find_checkpoint(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "find_checkpoint", find_then_publish if world.is_first else find_when_published)
        return loads(world, source, config)


def load_to_generate(world, source, config):
    tp = TensorParallel(rank=world.rank, size=world.size, group=world.group)
    model, _ = load_model(source, Loading(tokenizer=config.data.tokenizer), tp=tp)
    return float(model.norm.weight[0])


def load_to_train(world, source, config):
    reader = open_start(config, world)
    return float(reader.read_tensor("model.norm.weight")[0])


@pytest.mark.parametrize("loads", [load_to_generate, load_to_train])
def test_ranks_load_one_checkpoint_of_a_run_that_goes_on(ranks, case, tmp_path, loads):
    source, before = tmp_path / "live", CheckpointReader(case.folder / "run")
    shutil.copytree(case.folder / "run", source)
    wholes = [before.whole(name) for kind, name in before.tensors() if kind == "weight"]

    def sevens(fragments):
        return (torch.full((fragment.stop,), 7.0) for fragment in fragments)

    write_offline(source / "prepared", 7, [wholes], sevens, num_ranks=1, layout={}, state=before.state)
    config = config_of(case, "unbegun", init_from=source)
    expected = float(before.read_tensor("model.norm.weight")[0])
    assert ranks.run(2, load_while_a_run_saves, source, config, loads) == [expected, expected]


def test_a_change_of_rope_at_the_start_is_reported(case, capsys):
    scaling = RopeScaling(kind="yarn", original_max_position_embeddings=64)
    model = {"rope_factor": 4.0, "rope_theta": 1e5, "rope_scaling": scaling, "max_position_embeddings": 128}
    Trainer(config_of(case, "longer", init_from=case.folder / "run", model=model), ALONE).batches.close()
    changes = (
        "rope_factor 4.0 (there 1.0); rope_scaling.kind yarn (there linear); "
        "rope_scaling.original_max_position_embeddings 64 (there None); max_position_embeddings 128 (there 64)"
    )
    assert changes in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "run' was made with hidden_size = 32, not 64"),
        ({"tie_word_embeddings": True}, "was made with tie_word_embeddings = False, not True"),
        ({"num_hidden_layers": 4}, "was made with num_hidden_layers = 5, not 4"),
    ],
)
def test_another_model_is_not_a_valid_start(case, changes, message):
    config = config_of(case, "other", init_from=case.folder / "run", model=changes)
    with pytest.raises(Exception, match=message) as caught:
        Trainer(config, ALONE)
    assert "\n" not in str(caught.value)
    assert not config.output.exists()


def test_a_vocabulary_larger_than_the_tokenizer_needs_weights_to_start_from(case):
    with pytest.raises(Exception, match=f"the tokenizer .* has {case.vocab_size} ids"):
        Trainer(config_of(case, "wide", model={"vocab_size": case.vocab_size + 50}), ALONE)


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
@pytest.mark.parametrize("command", ["import", "export"])
def test_conversions_overwrite_nothing(case, folder, tmp_path, capsys, command, kind):
    (tmp_path / "there").mkdir() if kind == "folder" else (tmp_path / "there").symlink_to(tmp_path / "nowhere")
    source = folder if command == "import" else case.folder / "run"
    code, _, err = run(capsys, command, source, tmp_path / "there")
    assert (code, err) == (
        2,
        f"megacoder: {tmp_path / 'there'} exists already; choose another folder, or remove it first\n",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Qwen2MoeForCausalLM"]},
            "'Qwen2MoeForCausalLM'; only 'LlamaForCausalLM', 'MistralForCausalLM', 'Qwen2ForCausalLM' and ",
        ),
        ({"model_type": "gpt2"}, "model_type 'gpt2' beside architecture 'LlamaForCausalLM'; expected 'llama'"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(folder, tmp_path, capsys, changes, message):
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | changes))
    assert message in refused(capsys, "import", folder, tmp_path / "start")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer.json", content) for content in (b"", b"{}", b'{"version": "1.0", "trunc', b"\xff")),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_a_damaged_tokenizer_is_refused_at_import(folder, tmp_path, capsys, name, content):
    (folder / name).write_bytes(content)
    said = refused(capsys, "import", folder, tmp_path / "start")
    assert f"{folder / name}: not {'readable as JSON' if name == 'tokenizer_config.json' else ''}" in said


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_at_import(folder, tmp_path, capsys):
    definition = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    highest = max(token["id"] for token in definition["added_tokens"])
    added = definition["added_tokens"][-1]
    definition["added_tokens"] += [
        {**added, "id": number, "content": f"<{number}>"} for number in range(highest + 1, size + 1)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert refused(capsys, "import", folder, tmp_path / "start") == (
        f"megacoder: {folder}: the tokenizer has {size + 1:,} ids, the model knows {size:,}; use the tokenizer that "
        "the model was trained with\n"
    )


@pytest.mark.parametrize("lacking", [None, "<pad>", "<｜begin▁of▁sentence｜>"])
def test_a_tokenizer_without_settings_gets_the_usual_ones(folder, tmp_path, capsys, lacking):
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer_config.json").unlink()
    definition = json.loads((folder / "tokenizer.json").read_text())
    if lacking:
        next(token for token in definition["added_tokens"] if token["content"] == lacking)["content"] = "<other>"
        definition["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(definition))
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {"eos_token_id": None}))
    assert run(capsys, "import", folder, tmp_path / "start")[0] == 0
    code, _, err = run(capsys, "export", tmp_path / "start", tmp_path / "again")
    assert code == 0, err
    ids = {token["content"]: token["id"] for token in definition["added_tokens"]}
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["bos_token_id"] == ids.get("<｜begin▁of▁sentence｜>")
    assert config["eos_token_id"] == ids["<｜end▁of▁sentence｜>"]
    assert config["pad_token_id"] == ids.get("<pad>")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == tuple(
        config[f"{name}_token_id"] for name in ("bos", "eos", "pad")
    )
    assert theirs("").input_ids == ([] if config["bos_token_id"] is None else [config["bos_token_id"]])


def test_an_import_without_a_tokenizer_says_what_to_set(folder, tmp_path, capsys):
    (folder / "tokenizer.json").unlink()
    code, _, err = run(capsys, "import", folder, tmp_path / "start")
    assert (code, err.count("\n")) == (0, 1)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert "; no tokenizer.json; to continue training, set data.train, and data.tokenizer to a tokenizer" in err
    assert (
        f" with {size:,} ids or fewer (with more, also model.vocab_size), in {tmp_path / 'start' / 'train.toml'}" in err
    )
    assert not (tmp_path / "start" / "tokenizer").exists()
    assert load_toml(RunConfig, tmp_path / "start" / "train.toml").data.tokenizer.name == "tokenizer"


def test_an_import_with_a_tokenizer_for_other_text_says_so(folder, tmp_path, capsys):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(folder / "tokenizer.json"))
    code, _, err = run(capsys, "import", folder, tmp_path / "start")
    assert (code, err.count("\n")) == (0, 1)
    assert "its tokenizer cannot be used here" in err
    assert "data.tokenizer to a tokenizer with" in err


def test_weights_that_are_not_floats_are_refused(folder, tmp_path, capsys):
    path = next(path for path in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    save_file({**load_file(path), "model.norm.weight": torch.ones(32, dtype=torch.int8)}, path)
    said = refused(capsys, "import", folder, tmp_path / "start")
    assert f"{path}: model.norm.weight is stored as I8; only F32, BF16, F16 can be loaded" in said


def test_an_import_that_fails_at_its_last_file_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megacoder.cli.checkpoint_convert._start", no_space)
    refused(capsys, "import", folder, tmp_path / "start")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_a_failure_does_not_remove_a_folder_that_was_there(case, capsys, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("os.write", no_space)
    assert run(capsys, "reshard", case.folder / "run", tmp_path / "there")[0] == 1
    assert os.listdir(tmp_path / "there") == []


def test_an_imported_folder_is_not_a_runs_output(folder, case, tmp_path, capsys):
    assert run(capsys, "import", folder, tmp_path / "start")[0] == 0
    small, start = config_of(case, "unused"), load_toml(RunConfig, tmp_path / "start" / "train.toml")
    config = dataclasses.replace(small, output=tmp_path / "start", model=start.model)
    with pytest.raises(ConfigError, match=r"step-00000000 holds weights alone, .*init_from = '.*start'"):
        Trainer(config, ALONE)
    assert not (tmp_path / "start" / "run.toml").exists()


# Resuming


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, r"state.config was made with seed = 1234, not 5; set it back, or choose another output"),
        ({"model": {"rope_theta": 5.0}}, r"state.config.model was made with rope_theta = .*, not 5.0"),
        ({"model": {"tie_word_embeddings": True}}, r"made with tie_word_embeddings = False, not True"),
    ],
)
def test_without_run_toml_the_checkpoint_describes_the_run(case, tmp_path, changes, message):
    config = config_of(case, tmp_path / "run")
    shutil.copytree(case.folder / "run" / "checkpoints", config.output / "checkpoints")
    with pytest.raises(ConfigError, match=message):
        Trainer(changed(config, **changes), ALONE)
    assert not (config.output / "run.toml").exists(), "the right configuration must not be refused for it"
    trainer = Trainer(dataclasses.replace(config, checkpoint_every=1), ALONE)
    assert trainer.step == 2
    trainer.batches.close()


@pytest.mark.parametrize("without", [(), ("weight",)], ids=["of all kinds", "moments alone"])
def test_tensors_that_a_run_would_ignore_are_refused(case, tmp_path, without):
    """A head of its own, in the checkpoint of a model whose head is its embedding."""
    reader = CheckpointReader(case.folder / "run")
    state = json.loads(json.dumps(reader.state))
    state["config"]["model"] |= {"tie_word_embeddings": True}
    config = config_of(case, tmp_path / "run", model={"tie_word_embeddings": True})
    wholes = [
        reader.whole(name, kind) for kind, name in reader.tensors() if name != "lm_head.weight" or kind not in without
    ]
    write_offline(
        config.output / "checkpoints", 2, [wholes], reader.stream, num_ranks=1, layout={}, state=state
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r" of lm_head.weight: shape .*; state.config.model implies none"):
        Trainer(config, ALONE)


@pytest.mark.parametrize("command", ["export", "reshard"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 4},
            "model.layers.4.input_layernorm.weight: shape [32]; state.config.model implies none",
        ),
        (
            {"num_hidden_layers": 6},
            "model.layers.5.input_layernorm.weight: none; state.config.model implies shape [32]",
        ),
        ({"hidden_size": 0}, "model.hidden_size = 0: must be at least 1"),
        ({"size": 1}, "unknown key 'size'"),
    ],
)
def test_tensors_of_another_model_are_refused(case, tmp_path, capsys, command, change, message):
    reader = CheckpointReader(case.folder / "run")
    state = json.loads(json.dumps(reader.state))
    state["config"]["model"] |= change
    wholes = [reader.whole(name, kind) for kind, name in reader.tensors()]
    write_offline(tmp_path / "odd", 1, [wholes], reader.stream, num_ranks=1, layout={}, state=state)
    assert message in refused(capsys, command, tmp_path / "odd", tmp_path / "new")


def test_a_checkpoint_without_a_model_config_is_not_exported(tmp_path, capsys):
    reader_of = CheckpointReader(write_offline(
        tmp_path / "bare", 3, [[]], lambda fragments: iter(()), num_ranks=1, layout={}, state={}
    ))  # fmt: skip
    assert reader_of.step == 3
    assert "state.config.model: missing" in refused(capsys, "export", tmp_path / "bare", tmp_path / "hf")
