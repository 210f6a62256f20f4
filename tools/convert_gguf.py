"""An exported model to GGUF, by llama.cpp's own converter, which does not recognize a tokenizer trained here.

    python tools/convert_gguf.py --llama-cpp LLAMA_CPP my-model --outfile my-model.gguf

The converter finds out how text is split from a hash of the ids that a sample text gets, so that it knows published
vocabularies alone, and refuses others. llama.cpp itself has our splits, as "deepseek-coder": this script gives the
converter that name where tokenizer.json has them, and hands all further options on.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from megacoder.data.tokenizer import MIN_VOCAB_SIZE
from megacoder.data.tokenizer_training import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="checkout of llama.cpp")
    parser.add_argument("model", type=Path, help="folder that megacoder checkpoint export wrote")
    args, others = parser.parse_known_args()
    if not (args.llama_cpp / "convert_hf_to_gguf.py").is_file():
        parser.error(f"--llama-cpp {args.llama_cpp}: no convert_hf_to_gguf.py in it; name a checkout of llama.cpp")
    sys.path.insert(0, str(args.llama_cpp))
    converter = importlib.import_module("convert_hf_to_gguf")
    if has_our_splits(args.model):
        text_model = sys.modules.get("conversion.base", converter).TextModel  # older versions are one module
        text_model.get_vocab_base_pre = lambda self, tokenizer: "deepseek-coder"
    sys.argv = ["convert_hf_to_gguf.py", str(args.model), *others]
    converter.main()


def has_our_splits(model: Path) -> bool:
    ours = json.loads(train_tokenizer([], vocab_size=MIN_VOCAB_SIZE).definition)
    theirs = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    return bool(theirs.get("pre_tokenizer") == ours["pre_tokenizer"])


if __name__ == "__main__":
    main()
