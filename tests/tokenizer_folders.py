"""Folders of other models' tokenizers, byte-level BPE whose tokens hold line breaks with other text."""

import json
from pathlib import Path

import tokenizers
from data_samples import source_texts
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.tokenizer import Tokenizer, _byte_characters
from megacoder.data.tokenizer_folder import extended_files

__all__ = [
    "LLAMA3", "O200K", "SENTINELS", "number_added", "remove_bytes", "with_controls", "write_folder", "write_llama3",
    "write_qwen", "write_starcoder",
]  # fmt: skip

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""The published split of its tokenizer; Qwen's differs in the number of digits."""
O200K = (
    r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""A split like o200k's, where what follows an apostrophe may belong to the word before."""
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


def write_starcoder(folder: Path) -> Path:
    """As StarCoder's: one token ends texts and is named for everything, and a byte that no character needs is missing;
    so are two control characters', as in SmolLM2's."""
    ends = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    folder = write_folder(folder, LLAMA3, ["<|endoftext|>", *SENTINELS["starcoder"]], puts_bos=False, **ends)
    definition = json.loads((folder / "tokenizer.json").read_text())
    remove_bytes(definition, 0x04, 0x16, 0xF1)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def remove_bytes(definition: dict, *absent: int) -> list[str]:
    """Takes the tokens that have one of these bytes out of a tokenizer.json; returns how it spells the bytes."""
    model, letters = definition["model"], {_byte_characters()[byte] for byte in absent}
    kept = [token for token in model["vocab"] if not letters & {*token}]
    model["vocab"] = {token: index for index, token in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if not letters & {*"".join(pair)}]
    number_added(definition)
    return sorted(letters)


def number_added(definition: dict) -> None:
    """Gives added tokens the ids behind the others."""
    for index, token in enumerate(definition["added_tokens"], start=len(definition["model"]["vocab"])):
        token["id"] = index


def write_folder(
    folder: Path, split: str, controls: list[str], *, normalizer=None, puts_bos: bool = True, **settings
) -> Path:
    """Trains a tokenizer with this split and the control tokens `controls`, which its file does not mark special; with
    `puts_bos` its file puts a BOS of the settings in front of texts."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=split == LLAMA3))
    if normalizer is not None:
        backend.normalizer = normalizer
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(source_texts(6), trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in controls])
    if puts_bos and (bos := settings.get("bos_token")) is not None:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_controls(tokenizer: Tokenizer) -> Tokenizer:
    """The same with DeepSeek's control tokens behind its own."""
    ids = {text: tokenizer.vocab_size + number for number, text in enumerate(SPECIAL_TOKENS.values())}
    files = extended_files({"tokenizer.json": tokenizer.definition, "tokenizer_config.json": "{}"}, ids, Path())
    return Tokenizer(files["tokenizer.json"])
