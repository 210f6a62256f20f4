"""Initial weights as a function of (seed, Hugging Face name), whatever the layout and however weights are fused.

Every named weight is drawn in full, in fp32, on the CPU, from a generator keyed by its name; a rank that owns a part
slices it out. Drawing a 32,256 x 7,168 embedding takes about a second, once per run.
"""

import hashlib

import torch
from torch import Tensor

from megacoder.model.transformer import TransformerPart, weight_pieces

__all__ = ["draw_weight", "init_weights"]


def draw_weight(name: str, shape: torch.Size, *, std: float, seed: int) -> Tensor:
    """Normal(0, std) fp32 of `shape`, keyed by (seed, name); vectors (norm weights) are ones."""
    if len(shape) == 1:
        return torch.ones(shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_weights(model: TransformerPart, *, seed: int) -> None:
    """Fills `model` in place; rows that pad the vocabulary are zero."""
    for param in model.parameters():
        param.zero_()
    for piece in weight_pieces(model):
        whole = draw_weight(piece.hf_name, torch.Size(piece.shard.shape), std=model.config.init_std, seed=seed)
        piece.view.copy_(piece.shard.part(whole))
