"""Models of a few thousand weights, what one process makes of them, and transformers' twin of one."""

import torch

from megacoder.model.config import ModelConfig
from megacoder.model.huggingface_rope import rope_to_huggingface
from megacoder.model.init import init_weights, keyed_generator
from megacoder.model.transformer import Transformer, TransformerPart, weight_pieces
from megacoder.parallel.context import UNCUT
from megacoder.parallel.tensor import ALONE


def tiny_config(**changes) -> ModelConfig:
    """Of four tensor-parallel ranks, the third has 26 of 32 ids, and the last padding alone."""
    shape = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 144, "init_std": 0.08, "vocab_multiple": 64,
    }  # fmt: skip
    return ModelConfig(**{**shape, **changes})


def pipeline_config(num_layers: int, tied: bool = False, **changes) -> ModelConfig:
    """Smaller still, for tests of many schedules."""
    shape = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4,
        "max_position_embeddings": 16, "init_std": 0.1, "vocab_multiple": 16, "tie_word_embeddings": tied,
    }  # fmt: skip
    return tiny_config(num_hidden_layers=num_layers, **{**shape, **changes})


def make_model(config: ModelConfig, *, seed: int = 0, tp=ALONE, cp=UNCUT) -> Transformer:
    model = Transformer(config, tp, cp=cp)
    init_with_biases(model, seed=seed)
    return model


@torch.no_grad()
def init_with_biases(model: TransformerPart, *, seed: int) -> None:
    """As `init_weights`, but no bias is zero and no weight of a norm of heads one, which would hide one that is left
    out or misplaced."""
    init_weights(model, seed=seed)
    for piece in weight_pieces(model):
        is_bias, is_head_norm = piece.hf_name.endswith(".bias"), "_norm." in piece.hf_name
        if is_bias or is_head_norm:
            whole = 0.3 * torch.randn(piece.shard.shape, generator=keyed_generator(seed, piece.hf_name))
            piece.view.copy_(piece.shard.part(whole + 1 if is_head_norm else whole))


def grads_of(model) -> list[tuple]:
    """(name, shard, gradient) of what this rank holds."""
    pieces = weight_pieces(model)
    return [(p.hf_name, p.shard, p.param.grad[p.start : p.start + p.rows].clone()) for p in pieces]


def named_grads(model) -> dict[str, torch.Tensor]:
    """The gradients of a whole model, by Hugging Face name."""
    return {name: grad for name, _, grad in grads_of(model)}


def peer_of(model):
    """transformers' Llama, with biases Qwen2 or with norms of heads Qwen3, of the same weights, its attention written
    out."""
    import transformers

    config = model.config
    name = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias else "Llama"
    peer_config, peer_model = (getattr(transformers, name + kind) for kind in ("Config", "ForCausalLM"))
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    rope = rope_to_huggingface(config)["rope_parameters"]
    fields = {name: getattr(config, name) for name in same}
    peer = peer_model(peer_config(**fields, rope_parameters=rope, attn_implementation="eager"))
    missing, unexpected = peer.load_state_dict({p.hf_name: p.view for p in weight_pieces(model)}, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return peer
