"""The wrapper around llama.cpp's converter; the stand-in here has that one's names, in both of its layouts."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_samples import make_tokenizer
from tiny_models import tiny_config

from megacoder.data.tokenizer import Tokenizer
from megacoder.model.huggingface_rope import rope_to_huggingface
from megacoder.ops.rope_scaling import RopeScaling

SCRIPT = Path(__file__).parent.parent / "tools" / "convert_gguf.py"
YARN = RopeScaling(kind="yarn", original_max_position_embeddings=64)
BASE = """
class Writer:
    def add_rope_scaling_yarn_attn_factor(self, factor):
        print("factor", factor)
    def add_rope_scaling_attn_factors(self, share):
        print("share", round(share, 5))
    def add_eot_token_id(self, index):
        print("eot", index)
class TextModel:
    gguf_writer = Writer()
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")
    def set_gguf_parameters(self):
        self.gguf_writer.add_rope_scaling_yarn_attn_factor(1.4)
"""
MAIN = """
import sys
class LlamaModel(TextModel):
    def set_gguf_parameters(self):
        super().set_gguf_parameters()
def main():
    model = LlamaModel()
    model.set_gguf_parameters()
    print(model.get_vocab_base_pre(None), *sys.argv[1:])
"""


@pytest.fixture(params=["one module", "package"])
def llama_cpp(request, tmp_path):
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    if request.param == "package":
        (folder / "conversion" / "base.py").write_text(BASE)
    head = "from conversion.base import TextModel" if request.param == "package" else BASE
    (folder / "convert_hf_to_gguf.py").write_text(head + MAIN)
    return folder


@pytest.fixture
def model(tmp_path):
    make_tokenizer().save(tmp_path / "model")
    write_rope(tmp_path / "model", RopeScaling())
    return tmp_path / "model"


def write_rope(model, scaling):
    table = rope_to_huggingface(tiny_config(rope_factor=4.0, rope_scaling=scaling))
    (model / "config.json").write_text(json.dumps(table))


def convert(llama_cpp, model):
    words = [sys.executable, str(SCRIPT), "--llama-cpp", str(llama_cpp), str(model), "--outfile", "x.gguf"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_our_splits_get_their_name_and_others_are_the_converters_own_affair(llama_cpp, model):
    done = convert(llama_cpp, model)
    expected = f"factor 1.4\ndeepseek-coder {model} --outfile x.gguf\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    definition = json.loads((model / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["pretokenizers"].pop(2)
    (model / "tokenizer.json").write_text(json.dumps(definition))
    assert "BPE pre-tokenizer was not recognized" in convert(llama_cpp, model).stderr


def test_yarns_attention_factor_is_written_as_the_share_that_llama_cpp_multiplies_by(llama_cpp, model):
    write_rope(model, dataclasses.replace(YARN, attention_factor=1.4))
    done = convert(llama_cpp, model)
    assert done.stdout.splitlines()[1:-1] == ["share 1.22955"], done.stderr  # 1.4 / (0.1 ln 4 + 1)


def test_a_second_token_that_ends_a_text_is_written(llama_cpp, model):
    tokenizer = Tokenizer.load(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eot_id, tokenizer.eos_id]}))
    done = convert(llama_cpp, model)
    assert done.stdout.splitlines()[1:-1] == [f"eot {tokenizer.eot_id}"], done.stderr


@pytest.mark.parametrize(("name", "value", "usual"), [("beta_fast", 16.0, 32.0), ("truncate", False, True)])
def test_settings_of_yarn_that_llama_cpp_does_not_read_are_refused(tmp_path, model, name, value, usual):
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    write_rope(model, dataclasses.replace(YARN, **{name: value}))
    done = convert(tmp_path, model)
    assert done.returncode == 3
    assert f"{model}: YaRN with {name} = {value}; llama.cpp computes with {usual} in any case" in done.stderr


def test_biases_beside_norms_of_heads_are_refused(tmp_path, model):
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3", "attention_bias": True}))
    done = convert(tmp_path, model)
    assert done.returncode == 3
    assert f"{model}: qkv_bias beside qk_norm; llama.cpp's Qwen3 has no biases" in done.stderr


def test_a_folder_without_the_converter_is_named(tmp_path):
    done = convert(tmp_path, tmp_path)
    assert done.returncode == 2
    assert f"--llama-cpp {tmp_path}: no convert_hf_to_gguf.py in it" in done.stderr
