"""An exported folder is the same model in transformers, and comes back without a changed bit."""

import dataclasses
import json
import math
import os

import pytest
import tiny_models
import torch
from checkpoint_cases import no_space
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megacoder.checkpoint.huggingface import TensorFolder, write_model_folder
from megacoder.checkpoint.rank_file import bytes_of
from megacoder.checkpoint.tensor_file import StoredTensor
from megacoder.core.errors import CheckpointError, ConfigError, FormatError
from megacoder.data.tokenizer_training import train_tokenizer
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    export_model,
    import_model,
    import_with_tokenizer,
)
from megacoder.model.transformer import Transformer
from megacoder.ops.rope_scaling import RopeScaling

LLAMA3 = RopeScaling(kind="llama3", original_max_position_embeddings=16)
YARN = RopeScaling(kind="yarn", original_max_position_embeddings=16)
ORIGINAL = {"original_max_position_embeddings": 16}
SET = {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False}
SHAPES = {
    "grouped queries": {"num_key_value_heads": 2},
    "one kv head, linear rope": {"num_key_value_heads": 1, "rope_factor": 4.0, "rope_theta": 100000.0},
    "head_dim of its own": {"num_key_value_heads": 4, "head_dim": 24, "rope_theta": 500000.0},
    "llama3 rope": {"rope_factor": 4.0, "rope_scaling": LLAMA3},
    "yarn": {"rope_factor": 4.0, "rope_theta": 1000000.0, "rope_scaling": YARN},
    "yarn with all settings": {"rope_factor": 2.5, "rope_scaling": dataclasses.replace(YARN, **SET)},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "biases": {"qkv_bias": True, "rope_theta": 1e6},
    "biases, tied, linear rope": {"qkv_bias": True, "tie_word_embeddings": True, "rope_factor": 4.0},
    "biases, head_dim of its own": {"qkv_bias": True, "head_dim": 24},
    "normed heads": {"qk_norm": True, "rope_theta": 1e6, "head_dim": 24},
    "normed heads, tied": {"qk_norm": True, "tie_word_embeddings": True},
    "normed heads, yarn": {"qk_norm": True, "rope_factor": 4.0, "rope_scaling": YARN},
    "normed heads, no multiple": {"qk_norm": True, "num_attention_heads": 6, "rms_norm_eps": 1e-2},
    "normed heads, biases": {"qk_norm": True, "qkv_bias": True},
    "grouped, linear rope, head_dim": {"num_key_value_heads": 2, "rope_factor": 4.0, "head_dim": 8, "vocab_size": 131},
}


def make_model(**changes) -> Transformer:
    sizes = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0, "max_position_embeddings": 64, "init_std": 0.2,
    }  # fmt: skip
    return tiny_models.make_model(ModelConfig(**(sizes | changes)), seed=1)


@pytest.fixture
def folder(tmp_path):
    export_model(make_model(), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_transformers_computes_equal_logits(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model = make_model(**changes)
    export_model(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected = model.logits(model(tokens)), theirs(tokens).logits
    assert expected.std() > 0.5  # the weights are large enough for a wrong position or norm to show
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"rope_type": "linear"}, RopeScaling()),
        ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}, LLAMA3),
        ({"rope_type": "yarn", **ORIGINAL}, YARN),
        ({"type": "yarn", "truncate": False, "beta_fast": 8, "attention_factor": 1.5, **ORIGINAL},
         dataclasses.replace(YARN, truncate=False, beta_fast=8.0, attention_factor=1.5)),
        ({"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5, **ORIGINAL},
         dataclasses.replace(YARN, attention_factor=(0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))),
        ({"rope_type": "yarn", "mscale": 1, "mscale_all_dim": 0, "attention_factor": None, **ORIGINAL}, YARN),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_transformers_wrote_is_read(tmp_path, written, read):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        rope_theta=5000.0, rope_scaling={"factor": 4.0, **written},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "hf")
    model = import_model(tmp_path / "hf")
    assert (model.config.rope_factor, model.config.rope_theta) == (4.0, 5000.0)
    assert model.config.rope_scaling == read
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)


def assert_read_right(model, theirs, folder):
    """`model`, read from `folder / "hf"`, has the logits of `theirs` at 64 positions and is exported unchanged."""
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)
    export_model(model, folder / "again")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("published", [False, True], ids=["as transformers writes it", "as Qwen published it"])
def test_a_qwen2_is_read(tmp_path, tied, published):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=tied,
        rope_theta=1e6,
    )  # fmt: skip
    theirs = transformers.Qwen2ForCausalLM(config)
    for name, param in theirs.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(param)
    theirs.save_pretrained(tmp_path / "hf")
    if published:
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range")  # fmt: skip
        table = {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rope_theta": 1000000.0,
            "attention_dropout": 0.0, "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False,
            "use_cache": True, "tie_word_embeddings": tied, "use_mrope": False, "torch_dtype": "float32",
            **{key: getattr(config, key) for key in keys},
        }  # fmt: skip
        (tmp_path / "hf" / "config.json").write_text(json.dumps(table))
    model = import_model(tmp_path / "hf")
    assert (model.config.qkv_bias, model.config.rope_theta, model.config.tie_word_embeddings) == (True, 1e6, tied)
    assert_read_right(model, theirs, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True; only False can be loaded"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only 'full_attention' in every layer"),
        ({"model_type": "llama"}, "model_type 'llama' beside architecture 'Qwen2ForCausalLM'; expected 'qwen2'"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "k_proj.bias has no place"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "'Qwen2MoeForCausalLM'; only 'LlamaForCausalLM', .* can be load"),
    ],
)
def test_a_qwen2_of_another_kind_is_refused(tmp_path, changes, message):
    export_model(make_model(qkv_bias=True), tmp_path / "hf")
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(FormatError, match=message):
        import_model(tmp_path / "hf")


@pytest.mark.parametrize("changes", [{"head_dim": 24}, {"qk_norm": True}], ids=["llama", "qwen3"])
def test_a_bias_that_our_models_lack_is_refused_unless_it_is_zero(tmp_path, changes):
    export_model(make_model(qkv_bias=True, **changes), tmp_path / "hf")
    tensors, name = load_file(tmp_path / "hf" / "model.safetensors"), "model.layers.1.self_attn.o_proj.bias"
    assert not tensors[name].any()
    tensors[name][-1] = 1e-3
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(FormatError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero; only biases of queries"):
        import_model(tmp_path / "hf")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("published", [False, True], ids=["as transformers writes it", "as Qwen published it"])
def test_a_qwen3_is_read(tmp_path, tied, published):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=64, initializer_range=0.2,
        tie_word_embeddings=tied, rope_theta=1e6,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config)
    for name, param in theirs.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(param, 1.0, 0.5)
    theirs.save_pretrained(tmp_path / "hf")
    if published:
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
                "initializer_range")  # fmt: skip
        table = {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rope_theta": 1000000,
            "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "max_window_layers": 36,
            "sliding_window": None, "use_sliding_window": False, "use_cache": True, "tie_word_embeddings": tied,
            "torch_dtype": "float32", **{key: getattr(config, key) for key in keys},
        }  # fmt: skip
        (tmp_path / "hf" / "config.json").write_text(json.dumps(table))
    model = import_model(tmp_path / "hf")
    assert (model.config.qk_norm, model.config.head_dim, model.config.tie_word_embeddings) == (True, 24, tied)
    assert_read_right(model, theirs, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is missing"),
        ({"use_sliding_window": True}, "use_sliding_window = True; only False can be loaded"),
        ({"head_dim": None}, r"q_proj.weight .* implies \[512, 64\]"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "k_norm.weight has no place"),
    ],
)
def test_a_qwen3_of_another_kind_is_refused(tmp_path, changes, message):
    export_model(make_model(qk_norm=True), tmp_path / "hf")
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(FormatError, match=message):
        import_model(tmp_path / "hf")


@pytest.mark.parametrize("given", [True, False, None])
def test_what_an_architecture_does_not_read_is_not_heeded(tmp_path, given):
    write_mistral(tmp_path / "mistral", sliding_window=None)
    export_model(make_model(qkv_bias=True), tmp_path / "qwen2")
    for name in ("mistral", "qwen2"):
        edit_config(tmp_path / name, attention_bias=given)
        assert import_model(tmp_path / name).config.qkv_bias == (name == "qwen2")
    edit_config(tmp_path / "qwen2", use_sliding_window=None)
    import_model(tmp_path / "qwen2")


@pytest.mark.parametrize("given", [1, 1.0, "true"])
def test_a_bias_setting_that_is_neither_true_nor_false_is_refused(tmp_path, given):
    export_model(make_model(), tmp_path / "hf")
    edit_config(tmp_path / "hf", attention_bias=given)
    with pytest.raises(FormatError, match=f"attention_bias = {given!r}: expected true or false"):
        import_model(tmp_path / "hf")


def write_mistral(folder, **changes):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "rope_theta": 1e6,
    }  # fmt: skip
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**(sizes | changes)))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("changes", [{"sliding_window": None}, {"sliding_window": 64}, {}, {"head_dim": 16}], ids=str)
def test_a_mistral_is_read_and_exported_as_a_llama(tmp_path, changes):
    theirs = write_mistral(tmp_path / "hf", **changes)
    model = import_model(tmp_path / "hf")
    assert_read_right(model, theirs, tmp_path)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "window"),
    [({"sliding_window": 63}, "63"), ({"sliding_window": "64"}, "'64'"), ({"max_position_embeddings": 4097}, "4096")],
)
def test_a_mistral_with_a_sliding_window_is_refused(tmp_path, changes, window):
    """Also where the key is missing, which transformers takes for 4,096."""
    write_mistral(tmp_path / "hf", sliding_window=None)
    path = tmp_path / "hf" / "config.json"
    table = json.loads(path.read_text())
    del table["sliding_window"]
    path.write_text(json.dumps(table | changes))
    with pytest.raises(FormatError, match=rf"sliding_window = {window}, below max_position_embeddings = \d+; only"):
        import_model(tmp_path / "hf")


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_import_of_export_changes_no_bit(tmp_path, monkeypatch, changes, dtype, max_shard_bytes):
    model = make_model(**changes).to(dtype)
    monkeypatch.setattr("megacoder.checkpoint.huggingface._MAX_SHARD_BYTES", max_shard_bytes)
    export_model(model, tmp_path / "hf")
    again = import_model(tmp_path / "hf")
    assert again.config == model.config
    assert [(name, param.dtype) for name, param in again.named_parameters()] == [
        (name, dtype) for name, _ in model.named_parameters()
    ]
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def stored(tensors):
    """Arguments of `write_model_folder` for these tensors."""
    return {
        "config": {},
        "generation_config": {},
        "files": {},
        "tensors": [StoredTensor(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()],
        "data": lambda name: [bytes_of(part) for part in tensors[name].split(7)],
    }


def test_shards_and_index(tmp_path, monkeypatch):
    tensors = {name: torch.full((10,), value) for name, value in [("a", 1.0), ("b", 2.0), ("c", 3.0)]}
    tensors["big"] = torch.arange(50.0)
    monkeypatch.setattr("megacoder.checkpoint.huggingface._MAX_SHARD_BYTES", 80)
    write_model_folder(tmp_path / "hf", **stored(tensors))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert index == {
        "metadata": {"total_size": 320}, "weight_map": {"a": first, "b": first, "c": second, "big": third}
    }  # fmt: skip
    assert sorted(load_file(tmp_path / "hf" / first)) == ["a", "b"]
    with safe_open(tmp_path / "hf" / third, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, "without which transformers 4 refuses the file"
    loaded = {name: load_file(tmp_path / "hf" / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert sorted(os.listdir(tmp_path / "hf")) == [
        "config.json", "generation_config.json", first, second, third, "model.safetensors.index.json"
    ]  # fmt: skip


def test_a_failed_export_leaves_the_old_folder(folder, monkeypatch):
    before = load_file(folder / "model.safetensors")

    def no_more(name):
        raise RuntimeError("no more")

    arguments = stored({"a": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="no more"):
        write_model_folder(folder, **{**arguments, "data": no_more})
    monkeypatch.setattr("os.write", no_space)
    with pytest.raises(CheckpointError, match="cannot write the model: No space left on device"):
        write_model_folder(folder, **arguments)
    assert load_file(folder / "model.safetensors").keys() == before.keys()
    assert os.listdir(folder.parent) == ["hf"]


def test_the_tokenizer_is_exported_with_the_model(tmp_path):
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, vocab_size=260)
    tokenizer.save(tmp_path / "tokenizer")
    export_model(make_model(vocab_size=300), tmp_path / "hf", tokenizer_folder=tmp_path / "tokenizer")
    _, again = import_with_tokenizer(tmp_path / "hf")
    assert again.digest == tokenizer.digest
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "hf" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.model_max_length == 64
    assert theirs("def f").input_ids == [tokenizer.bos_id, *tokenizer.encode("def f")]


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path):
    train_tokenizer(["x"], vocab_size=256).save(tmp_path / "tokenizer")
    with pytest.raises(FormatError, match="has 265 ids, the model knows 97"):
        export_model(make_model(), tmp_path / "hf", tokenizer_folder=tmp_path / "tokenizer")
    assert not (tmp_path / "hf").exists()


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'"),
        ({"architectures": None}, "architecture 'none named'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is missing"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes': expected true or false"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'; only 'default', 'linear'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"RoPE of type \"\['yarn'\]\"; only 'default'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn' needs original_max_position_embeddings"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, **ORIGINAL}},
            "type 'llama3' needs low_freq_factor and high_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "two types, 'linear' and 'yarn'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling has the unknown key 'factor'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fats": 16, **ORIGINAL}},
            r"rope_scaling has the unknown key 'beta_fats' \(did you mean 'beta_fast'\?\)",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7, **ORIGINAL}},
            "expected both mscale and mscale_all_dim",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 1.1, **ORIGINAL}},
            "attn_factor, which vLLM reads, means another attention factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": "2", **ORIGINAL}}, "'factor': '2'.*: expected numbers"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "8", **ORIGINAL}},
            "RoPE: beta_fast = '8': expected float",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 0.5, **ORIGINAL}},
            r"model\.rope_factor = 0\.5: below 1",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0, **ORIGINAL, "beta_slow": 64}},
            r"model\.rope_scaling\.beta_slow = 64\.0 and beta_fast = 32\.0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}, "rope_scaling": None},
            "rope_parameters = .*: RoPE of type 'linear' needs factor",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor = 0\.5; only heads rotated in full",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": "4"}}, "factor = '4'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": -4}},
            "rope_factor = -4.0: must be positive",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers = 2\.5"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3 is not a multiple"),
        ({"torch_dtype": "int8"}, "torch_dtype = 'int8'"),
        ({"vocab_size": 98}, r"model.embed_tokens.weight has shape \[97, 64\]; config.json implies \[98, 64\]"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.* has no place"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(FormatError, match=message) as caught:
        import_model(folder)
    assert "\n" not in str(caught.value)


def test_old_style_scaling_and_rotary_tables_are_read(folder):
    edit_config(folder, rope_parameters=None, rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=100000)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "model.safetensors")
    config = import_model(folder).config
    assert (config.rope_factor, config.rope_theta) == (4.0, 100000.0)


def test_what_a_config_leaves_out_is_what_transformers_assumes(folder):
    config = json.loads((folder / "config.json").read_text())
    kept = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads")  # fmt: skip
    read = config_from_huggingface({key: config[key] for key in kept}, where="config.json")
    assert read == ModelConfig(
        vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0, rope_factor=1.0,
        max_position_embeddings=2048, tie_word_embeddings=False, init_std=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_folder_has_two_names(folder, name):
    edit_config(folder, **{"dtype": None, "torch_dtype": None, name: "bfloat16"})
    assert {param.dtype for param in import_model(folder).parameters()} == {torch.bfloat16}


def test_places_that_contradict_each_other_about_rope_are_refused(folder):
    linear = {"rope_type": "linear", "factor": 4.0}
    edit_config(folder, rope_parameters=linear, rope_scaling={**linear, "factor": 8.0})
    with pytest.raises(FormatError, match=r"factor is 4\.0 in one place and 8\.0 in rope_scaling"):
        import_model(folder)
    edit_config(folder, rope_parameters={**linear, "rope_theta": 5e5}, rope_scaling=None, rope_theta=1e4)
    with pytest.raises(FormatError, match=r"rope_theta is 10000\.0 in one place and 500000\.0 in rope_parameters"):
        import_model(folder)
    yarn = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
    for here, there, message in (
        (linear, yarn, "kind is 'linear' in one place and 'yarn' in rope_scaling"),
        (yarn, {**yarn, "attention_factor": 1.5}, r"attention_factor is None in one place and 1\.5 in rope_scaling"),
        (yarn, {**yarn, "original_max_position_embeddings": 8}, "original_max_position_embeddings is 16 in one place"),
    ):
        edit_config(folder, rope_theta=None, rope_parameters=here, rope_scaling=there)
        with pytest.raises(FormatError, match=message):
            import_model(folder)
    edit_config(folder, rope_scaling=None, rope_parameters=yarn, original_max_position_embeddings=8)
    with pytest.raises(FormatError, match="original_max_position_embeddings is 8 in one place and 16 in rope_param"):
        import_model(folder)
    edit_config(folder, rope_scaling={**yarn, "beta_fast": 32, "truncate": True}, original_max_position_embeddings=16)
    assert import_model(folder).config.rope_scaling == YARN


def test_older_readers_find_the_linear_scaling_too():
    """transformers before 4.43 reads `type`, later ones `rope_type`, transformers 5 `rope_parameters`."""
    config = config_to_huggingface(make_model(rope_factor=4.0).config, torch.float32)
    assert config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_readers_find_the_other_kinds_under_each_name():
    """The published llama3 and yarn folders have these keys; what is left out here is the default of all readers."""
    config = config_to_huggingface(make_model(**SHAPES["llama3 rope"]).config, torch.float32)
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
    assert config["rope_scaling"] == llama3 | {"type": "llama3"}
    assert config["rope_parameters"] == llama3 | {"rope_theta": 10000.0}
    config = config_to_huggingface(make_model(**SHAPES["yarn"]).config, torch.float32)
    yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, **ORIGINAL}
    assert config["rope_scaling"] == yarn | {"type": "yarn"}
    assert config["rope_parameters"] == yarn | {"rope_theta": 1000000.0}
    config = config_to_huggingface(make_model(**SHAPES["yarn with all settings"]).config, torch.float32)
    default = 0.1 * math.log(2.5) + 1  # of which vLLM's attn_factor is a share
    expected = {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3, "attn_factor": 1.3 / default}
    yarn = {"rope_type": "yarn", "factor": 2.5, "truncate": False, **ORIGINAL, **expected}
    assert config["rope_parameters"] == pytest.approx(yarn | {"rope_theta": 10000.0})


def test_missing_and_broken_files_are_named(folder, tmp_path):
    with pytest.raises(FormatError, match="nowhere: no such folder"):
        import_model(tmp_path / "nowhere")
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(FormatError, match=r"config\.json: no such file"):
        import_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not readable as JSON"):
        import_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="expected a JSON object, got list"):
        import_model(folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(FormatError, match=r"model\.safetensors: not readable as safetensors"):
        import_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor"):
        import_model(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match="only pickled weights"):
        import_model(folder)


def test_faulty_shards_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("megacoder.checkpoint.huggingface._MAX_SHARD_BYTES", 50_000)
    export_model(make_model(), tmp_path / "hf")
    index_path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shapes = {"lm_head.weight": (97, 64)}
    moved = {"weight_map": {"lm_head.weight": index["weight_map"]["model.embed_tokens.weight"]}}
    index_path.write_text(json.dumps(moved))
    with pytest.raises(FormatError, match=r"00001-of-.*: tensor lm_head.weight is missing"):
        TensorFolder(tmp_path / "hf").check(shapes)
    for weight_map in (None, {"lm_head.weight": "../elsewhere.safetensors"}, {"lm_head.weight": 1}):
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match="no 'weight_map'"):
            TensorFolder(tmp_path / "hf")
    index_path.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(FormatError, match=r"gone\.safetensors: not readable"):
        TensorFolder(tmp_path / "hf").check(shapes)


def test_exports_that_transformers_would_refuse_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="hidden_size 64 is not a multiple of num_attention_heads 3"):
        export_model(make_model(num_attention_heads=3, num_key_value_heads=1), tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"dtype torch\.float16"):
        export_model(make_model(), tmp_path / "hf", dtype=torch.float16)
    assert os.listdir(tmp_path) == []
