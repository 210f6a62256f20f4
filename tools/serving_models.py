"""Small models of every kind that is exported, for `check_serving.py`; made in seconds."""

import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.tokenizer_training import train_tokenizer
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import export_model
from megacoder.model.init import init_weights, keyed_generator
from megacoder.model.transformer import Transformer, weight_pieces
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.ops.rope_scaling import RopeScaling

__all__ = ["QUESTION", "make_models"]

QUESTION = "Write a function that adds two numbers."
_ANSWER = "def add(a, b):\n    return a + b"
_LLAMA3 = RopeScaling(kind="llama3", original_max_position_embeddings=128)
_YARN = RopeScaling(kind="yarn", original_max_position_embeddings=128)
_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512, "init_std": 0.08,
}  # fmt: skip
_KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_factor": 4.0, "rope_theta": 100000.0},
    "llama3": {"num_key_value_heads": 2, "rope_factor": 4.0, "rope_scaling": _LLAMA3},
    "yarn": {"num_key_value_heads": 2, "rope_factor": 4.0, "rope_scaling": _YARN},
    "yarn-sharp": {"rope_factor": 4.0, "rope_scaling": replace(_YARN, attention_factor=1.4)},
    "yarn-betas": {"rope_factor": 4.0, "rope_scaling": replace(_YARN, beta_fast=16.0, beta_slow=0.5, truncate=False)},
    "biases-tied": {"qkv_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 2, "rope_theta": 1e6},
    "normed-heads": {"qk_norm": True, "num_key_value_heads": 2, "head_dim": 128, "rope_theta": 1e6},
    "normed-biases": {"qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True},
    "wide-heads": {"num_key_value_heads": 1, "head_dim": 128},
    "bf16": {"rope_factor": 4.0, "rope_theta": 100000.0},
    "tuned": {"num_key_value_heads": 2},
}  # fmt: skip


def make_models(folder: Path) -> list[Path]:
    """Exports one model of each kind into `folder`; `tuned` knows the answer to QUESTION by heart, the others have
    weights that are random, and large enough for a wrong position or norm to show."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[:20]]
    tokenizer = train_tokenizer([*texts, "# 注释：中文字符，测试。\n" * 9], vocab_size=2000)
    tokenizer.save(folder / "tokenizer")
    for name, changes in _KINDS.items():
        model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **{**_SIZES, **changes}))
        init_weights(model, seed=0)
        chat = FormatConfig() if name == "tuned" else None
        if chat is not None:
            _learn_by_heart(model, ChatFormat(chat, tokenizer))
        for piece in weight_pieces(model):
            if piece.hf_name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
                generator = keyed_generator(0, piece.hf_name)
                piece.view.detach().add_(0.3 * torch.randn(piece.view.shape, generator=generator))
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        export_model(model, folder / name, dtype=dtype, tokenizer_folder=folder / "tokenizer", chat=chat)
    return [folder / name for name in _KINDS]


def _learn_by_heart(model: Transformer, chat: ChatFormat, *, steps: int = 40) -> None:
    segments = chat.segments([("user", QUESTION), ("assistant", _ANSWER)])
    ids = [index for segment in segments for index in segment.ids]
    wanted = [index if segment.trained else IGNORE_INDEX for segment in segments for index in segment.ids]
    tokens, labels = torch.tensor([ids[:-1]]), torch.tensor([wanted[1:]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (model.loss(tokens, labels) / (labels != IGNORE_INDEX).sum()).backward()
        optimizer.step()
