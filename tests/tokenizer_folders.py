"""Folders of other models' tokenizers, byte-level BPE whose tokens hold line breaks with other text."""

import json
from pathlib import Path

import tokenizers
from data_samples import source_texts
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from megacoder.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from megacoder.data.tokenizer_folder import extended_files

__all__ = ["LLAMA3", "SENTINELS", "with_controls", "write_folder", "write_llama3", "write_qwen"]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""The published split of its tokenizer; Qwen's differs in the number of digits."""
SENTINELS = {
    "qwen": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    "starcoder": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
}
"""What other models call the sentinels of fill-in-the-middle: begin, hole, end."""


def write_llama3(folder: Path) -> Path:
    """As Llama 3's: its names and its split; the settings name tokens as text."""
    return write_folder(
        folder, LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
    )  # fmt: skip


def write_qwen(folder: Path) -> Path:
    """As Qwen's: NFC, no BOS, and settings that hold tokens as objects."""
    ends = {name: {"__type": "AddedToken", "content": text, "special": True}
            for name, text in (("eos_token", "<|endoftext|>"), ("pad_token", "<|pad|>"))}  # fmt: skip
    return write_folder(
        folder, LLAMA3.replace("{1,3}", ""), ["<|endoftext|>", "<|im_start|>", "<|pad|>"],
        normalizer=normalizers.NFC(), bos_token=None, **ends,
    )  # fmt: skip


def write_folder(folder: Path, split: str, controls: list[str], *, normalizer=None, **settings) -> Path:
    """Trains a tokenizer with this split and the control tokens `controls`, which its file does not mark special."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(source_texts(6), trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in controls])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_controls(tokenizer: Tokenizer) -> Tokenizer:
    """The same with DeepSeek's control tokens behind its own."""
    ids = {text: tokenizer.vocab_size + number for number, text in enumerate(SPECIAL_TOKENS.values())}
    files = extended_files({"tokenizer.json": tokenizer.definition, "tokenizer_config.json": "{}"}, ids, Path())
    return Tokenizer(files["tokenizer.json"])
