"""The wrapper around llama.cpp's converter; the stand-in here has that one's names, in both of its layouts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_samples import make_tokenizer

SCRIPT = Path(__file__).parent.parent / "tools" / "convert_gguf.py"
BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")
"""
MAIN = """
import sys
class LlamaModel(TextModel):
    pass
def main():
    print(LlamaModel().get_vocab_base_pre(None), *sys.argv[1:])
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


def convert(llama_cpp, model):
    words = [sys.executable, str(SCRIPT), "--llama-cpp", str(llama_cpp), str(model), "--outfile", "x.gguf"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_our_splits_get_their_name_and_others_are_the_converters_own_affair(llama_cpp, tmp_path):
    make_tokenizer().save(tmp_path / "model")
    done = convert(llama_cpp, tmp_path / "model")
    assert (done.returncode, done.stdout) == (0, f"deepseek-coder {tmp_path / 'model'} --outfile x.gguf\n"), done.stderr
    definition = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["pretokenizers"].pop(2)
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(definition))
    assert "BPE pre-tokenizer was not recognized" in convert(llama_cpp, tmp_path / "model").stderr


def test_a_folder_without_the_converter_is_named(tmp_path):
    done = convert(tmp_path, tmp_path)
    assert done.returncode == 2
    assert f"--llama-cpp {tmp_path}: no convert_hf_to_gguf.py in it" in done.stderr
