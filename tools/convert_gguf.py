"""An exported model to GGUF, by llama.cpp's own converter, which does not recognize a tokenizer trained here.

    python tools/convert_gguf.py --llama-cpp LLAMA_CPP my-model --outfile my-model.gguf

The converter finds out how text is split from a hash of the ids that a sample text gets, so that it knows published
vocabularies alone, and refuses others. llama.cpp itself has our splits, as "deepseek-coder": this script gives the
converter that name where tokenizer.json has them, and hands all further options on. The converter reads one token that
ends a text; where generation_config.json names another, it is written, too.

Of YaRN, the converter writes an attention factor where llama.cpp does not read it: here it is written as the share of
the default that llama.cpp multiplies by. Other settings of YaRN than the usual are refused (exit code 3), since
llama.cpp does not read them, and would compute something else; so are biases beside norms of heads, which it lacks.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from megacoder.data.tokenizer import MIN_VOCAB_SIZE
from megacoder.data.tokenizer_folder import read_tokenizer_files
from megacoder.data.tokenizer_training import train_tokenizer
from megacoder.ops.rope_scaling import RopeScaling

__all__ = ["CONVERTER", "REFUSED", "main"]

CONVERTER = "convert_hf_to_gguf.py"
REFUSED = 3
"""Exit code for what llama.cpp cannot compute; argparse has 2 for wrong options."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="checkout of llama.cpp")
    parser.add_argument("model", type=Path, help="folder that megacoder checkpoint export wrote")
    args, others = parser.parse_known_args()
    if not (args.llama_cpp / CONVERTER).is_file():
        parser.error(f"--llama-cpp {args.llama_cpp}: no {CONVERTER} in it; name a checkout of llama.cpp")
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    rope = rope_of(config)
    if reason := why_not_computed(config, rope):
        parser.exit(REFUSED, f"{parser.prog}: {args.model}: {reason}\n")
    sys.path.insert(0, str(args.llama_cpp))
    converter = importlib.import_module("convert_hf_to_gguf")
    text_model = sys.modules.get("conversion.base", converter).TextModel  # older versions are one module
    if has_our_splits(args.model):
        text_model.get_vocab_base_pre = lambda self, tokenizer: "deepseek-coder"
        for name, index in zip(("eot", "eom"), further_ends(args.model), strict=False):
            write_also(text_model, f"add_{name}_token_id", index)
    if "attn_factor" in rope:
        write_also(text_model, "add_rope_scaling_attn_factors", rope["attn_factor"])
    sys.argv = [CONVERTER, str(args.model), *others]
    converter.main()


def why_not_computed(config: dict[str, Any], rope: dict[str, Any]) -> str | None:
    """What llama.cpp would compute otherwise."""
    if config.get("model_type") == "qwen3" and config.get("attention_bias"):
        return "qkv_bias beside qk_norm; llama.cpp's Qwen3 has no biases"
    for name in ("beta_fast", "beta_slow", "truncate"):
        if rope.get(name, usual := getattr(RopeScaling(), name)) != usual:
            return f"YaRN with {name} = {rope[name]}; llama.cpp computes with {usual} in any case"
    return None


def has_our_splits(model: Path) -> bool:
    ours = json.loads(train_tokenizer([], vocab_size=MIN_VOCAB_SIZE).definition)
    theirs = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    return bool(theirs.get("pre_tokenizer") == ours["pre_tokenizer"])


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about RoPE, as `megacoder checkpoint export` writes it."""
    found = config.get("rope_parameters")
    return found if isinstance(found, dict) else {}


def further_ends(model: Path) -> list[int]:
    """Ids that end a text beside the tokenizer's own."""
    ends = read_tokenizer_files(model, max_length=None).ids["eos_token_id"]
    return ends[1:] if isinstance(ends, list) else []


def write_also(text_model: type[Any], method: str, value: float) -> None:
    """Has the converter call this method of its writer, too."""
    set_parameters = text_model.set_gguf_parameters

    def set_all_parameters(self: Any) -> None:
        set_parameters(self)
        getattr(self.gguf_writer, method)(value)

    text_model.set_gguf_parameters = set_all_parameters


if __name__ == "__main__":
    main()
