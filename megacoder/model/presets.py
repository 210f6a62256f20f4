"""The paper's models by name, with their training batch size and learning rate, some of Qwen's, and small ones.

Shapes and RoPE are those of the published `config.json` files, of models that were extended to 16,384 positions (v1.5
was not). Batch, rate and `seq_length` are those of pre-training, which has 4,096 positions and an unscaled RoPE of base
10,000: `examples/pretrain_*.toml` have that RoPE, `examples/long_context_*.toml` the one of the presets. Sources:
arXiv:2401.14196, Table 2 and section 3; arXiv:2401.02954 for v1.5; arXiv:2409.12186, Table 1 and 3.2 for Qwen2.5-Coder;
arXiv:2505.09388, Table 1 and 3.2 for Qwen3, whose base models have 32,768 positions.
"""

from dataclasses import dataclass

from megacoder.core.config import did_you_mean
from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig

__all__ = ["PRESETS", "Preset", "find_preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A shape and how it was trained; None where that is unpublished."""

    model: ModelConfig
    seq_length: int = 4096
    """tokens of a sequence in pre-training"""
    global_batch_size: int | None = None
    """sequences of an update"""
    peak_lr: float | None = None
    """learning rate after the warm-up"""


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: object) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, **more,  # type: ignore[arg-type]
    )  # fmt: skip


_LONG = {"rope_theta": 100000.0, "rope_factor": 4.0, "max_position_embeddings": 16384}
_QWEN = {"rope_theta": 1e6, "max_position_embeddings": 32768, "init_std": 0.02}
_QWEN2, _QWEN3 = _QWEN | {"qkv_bias": True}, _QWEN | {"qk_norm": True, "vocab_size": 151936}
_TINY = {"head_dim": 16, "vocab_size": 512, "max_position_embeddings": 512, "init_std": 0.02}

PRESETS: dict[str, Preset] = {
    "1.3b": Preset(model=_llama(2048, 5504, 24, 16, 16, **_LONG), global_batch_size=1024, peak_lr=5.3e-4),
    "5.7b": Preset(model=_llama(4096, 11008, 32, 32, 1, **_LONG)),
    "6.7b": Preset(model=_llama(4096, 11008, 32, 32, 32, **_LONG), global_batch_size=2304, peak_lr=4.2e-4),
    "33b": Preset(model=_llama(7168, 19200, 62, 56, 8, **_LONG), global_batch_size=3840, peak_lr=3.5e-4),
    "v1.5-7b": Preset(model=_llama(4096, 11008, 30, 32, 32, vocab_size=102400)),
    "qwen2.5-1.5b": Preset(
        model=_llama(1536, 8960, 28, 12, 2, vocab_size=151936, tie_word_embeddings=True, **_QWEN2), seq_length=8192
    ),
    "qwen2.5-7b": Preset(model=_llama(3584, 18944, 28, 28, 4, vocab_size=152064, **_QWEN2), seq_length=8192),
    "qwen3-1.7b": Preset(model=_llama(2048, 6144, 28, 16, 8, tie_word_embeddings=True, **_QWEN3)),
    "qwen3-8b": Preset(model=_llama(4096, 12288, 36, 32, 8, **_QWEN3)),
    "tiny": Preset(model=_llama(64, 176, 4, 4, 4, **_TINY), seq_length=128, global_batch_size=16, peak_lr=3e-3),
    "tiny-gqa": Preset(model=_llama(64, 176, 6, 4, 2, **_TINY), seq_length=128, global_batch_size=16, peak_lr=3e-3),
}
"""By the names that `megacoder plan --model` takes."""


def find_preset(name: str) -> Preset:
    """The preset called `name`; ConfigError with the nearest name where there is none."""
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise ConfigError(f"unknown model {name!r}{hint}; known: {', '.join(PRESETS)}, or the TOML file of a run")
    return PRESETS[name]
