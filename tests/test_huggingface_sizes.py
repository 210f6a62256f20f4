"""DeepSeek-Coder's four sizes, scaled down and written as DeepSeek published them: imported, exported, and loaded by
transformers."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from checkpoint_cases import no_flush  # noqa: F401
from command_line import refusal
from safetensors.torch import load_file

from megacoder.cli.main import main
from megacoder.data.chat_template import CHAT_TEMPLATE
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import train_tokenizer
from megacoder.model.huggingface import import_model

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Size:
    """The shape's proportions; head_dim, positions, RoPE and vocabulary's padding are alike in all."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SIZES = {
    "1.3B": Size(64, 172, 3, 8, 8),
    "5.7B": Size(64, 172, 4, 8, 1),  # one key-value head for all
    "6.7B": Size(128, 344, 4, 16, 16),
    "33B": Size(112, 300, 5, 14, 2),  # seven query heads to each of its key-value heads
}
SOURCES = ["def scale(value):\n    return value * 2  # 2024\n", "class Führer:\n    pass\n"] * 3
MESSAGES = [
    {"role": "user", "content": "Write a quick sort."},
    {"role": "assistant", "content": "def sort(items): ..."},
    {"role": "user", "content": "Now with comments."},
]
SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)
BOS = "<｜begin▁of▁sentence｜>"


def publish(folder, size, *, instruct=True, newer=False):
    """A folder as DeepSeek's: bf16 shards, `rope_scaling` and `type` in config.json, Llama's tokenizer class."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(SOURCES, vocab_size=280)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=16384,
        rms_norm_eps=1e-6, initializer_range=0.1, tie_word_embeddings=False,
        eos_token_id=tokenizer.eot_id if instruct else tokenizer.eos_id,
        rope_theta=100000.0, rope_scaling={"rope_type": "linear", "factor": 4.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():  # norms of ones would hide one that is left out
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    if not newer:
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "initializer_range", "eos_token_id")  # fmt: skip
        table = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False, "use_cache": True, "pretraining_tp": 1, "bos_token_id": 32013,
            **{key: getattr(config, key) for key in keys},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(table))
    tokenizer.save(folder)
    settings = {
        "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": BOS, "lstrip": False},
        "eos_token": {"__type": "AddedToken", "content": "<|EOT|>" if instruct else "<｜end▁of▁sentence｜>"},
        "pad_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"},
        "model_max_length": 16384, "unk_token": None,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def command(*words):
    main(["checkpoint", *map(str, words)])


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("newer", [False, True], ids=["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_published_folder_comes_back_byte_for_byte(tmp_path, size, newer):
    source = tmp_path / "published"
    publish(source, size, newer=newer)
    assert ("rope_parameters" in json.loads((source / "config.json").read_text())) == newer
    command("import", source, tmp_path / "start")
    command("export", tmp_path / "start", tmp_path / "bf16")
    command("export", tmp_path / "start", tmp_path / "fp32", "--dtype", "fp32")
    before, after = tensors_of(source), tensors_of(tmp_path / "bf16")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.int16), after[name].view(torch.int16)), name
    tokens = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(1))
    ours = import_model(tmp_path / "fp32")
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens).logits
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")(tokens).logits
        found = ours.logits(ours(tokens))
    assert expected.std() > 0.3
    torch.testing.assert_close(exported, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture
def exported(tmp_path):
    """An instruct model that went through import and export, and the tokenizer it was published with."""
    tokenizer = publish(tmp_path / "published", SIZES["1.3B"])
    command("import", tmp_path / "published", tmp_path / "start")
    command("export", tmp_path / "start", tmp_path / "hf")
    return tmp_path / "hf", tokenizer


def test_auto_config_reads_rope_and_ids(exported):
    folder, tokenizer = exported
    config = transformers.AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else config.rope_scaling
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
    assert rope.get("rope_theta", getattr(config, "rope_theta", None)) == 100000.0
    assert config.max_position_embeddings == 16384
    generation = transformers.GenerationConfig.from_pretrained(folder)
    for found in (config, generation):
        assert (found.bos_token_id, found.eos_token_id) == (tokenizer.bos_id, [tokenizer.eot_id, tokenizer.eos_id])
        assert found.pad_token_id == tokenizer.eos_id


def test_auto_tokenizer_gives_the_published_ids(exported):
    folder, tokenizer = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*SOURCES[:2], "x = [1, 2]\n\n    y  = 3\t\r\n", "日本語 ü", ""):
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert theirs.decode(theirs(SOURCES[0]).input_ids, skip_special_tokens=True) == SOURCES[0]
    assert theirs.model_max_length == 16384
    assert Tokenizer.load(folder).digest == tokenizer.digest


@pytest.mark.parametrize("prompt", [False, True])
def test_the_chat_template_renders_as_deepseeks(exported, prompt):
    theirs = transformers.AutoTokenizer.from_pretrained(exported[0])

    def rendered(messages):
        return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    turns = (
        "### Instruction:\nWrite a quick sort.\n### Response:\ndef sort(items): ...\n<|EOT|>\n"
        "### Instruction:\nNow with comments.\n"
    )
    end = "### Response:\n" if prompt else ""
    assert rendered(MESSAGES) == BOS + SYSTEM + turns + end
    own = [{"role": "system", "content": "Answer in French."}, *MESSAGES]
    assert rendered(own) == BOS + "Answer in French." + turns + end  # and no line break, as DeepSeek's
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
    assert ids == theirs(rendered(MESSAGES), add_special_tokens=False).input_ids
    assert ids[0] == theirs.bos_token_id


def test_a_template_of_its_own_is_kept(tmp_path):
    publish(tmp_path / "published", SIZES["1.3B"])
    path = tmp_path / "published" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for name, changes in {"inside": {"chat_template": "{{ 1 }}"}, "beside": {}}.items():
        path.write_text(json.dumps(settings | changes))
        if name == "beside":
            (tmp_path / "published" / "chat_template.jinja").write_text("{{ 2 }}")
        command("import", tmp_path / "published", tmp_path / f"start-{name}")
        command("export", tmp_path / f"start-{name}", tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.chat_template == ("{{ 1 }}" if name == "inside" else "{{ 2 }}") != CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE of type 'yarn' needs factor and original_max_pos"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "factor is 2.0 in one place and 4.0"),
        ({"rope_parameters": {"rope_theta": 10000}}, "rope_theta is 100000 in one place and 10000"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\]: expected an object"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "architecture 'DeepseekV2ForCausalLM'"),
    ],
)
def test_unsupported_settings_of_a_published_config_are_refused(tmp_path, capsys, changes, message):
    publish(tmp_path / "published", SIZES["1.3B"])
    path = tmp_path / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    err = refusal(capsys, "checkpoint", "import", tmp_path / "published", tmp_path / "start")
    assert str(path) in err
    assert re.search(message, err)
    assert not (tmp_path / "start").exists()
