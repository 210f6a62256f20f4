"""Initial weights as a function of (seed, Hugging Face name), whatever the layout and however weights are fused.

Every named weight is drawn in full, in fp32, on the CPU, from a generator keyed by its name; a rank that owns a part
slices it out. Given up: a counter-based generator, with which it could draw that part alone; whole weights are drawn
once per run, at 250 million numbers a second and core.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megacoder.model.transformer import TransformerPart, WeightPiece, weight_pieces

__all__ = ["draw_weight", "init_weights", "keyed_generator"]

MOST_THREADS = 8
"""Each holds one weight, not just this rank's part of it."""


def draw_weight(name: str, shape: torch.Size, *, std: float, seed: int) -> Tensor:
    """Normal(0, std) fp32 of `shape`, keyed by (seed, name); of vectors, norm weights are ones and biases zeros."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    return torch.empty(shape).normal_(0.0, std, generator=keyed_generator(seed, name))


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers on the CPU that depend on nothing but (seed, name)."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


@torch.no_grad()
def init_weights(model: TransformerPart, *, seed: int) -> None:
    """Fills `model` in place; rows that pad the vocabulary are zero.

    A generator draws 250 million numbers a second on one core, so threads draw several weights at a time.
    """
    for param in model.parameters():
        param.zero_()

    @torch.no_grad()  # holds in one thread
    def fill(piece: WeightPiece) -> None:
        whole = draw_weight(piece.hf_name, torch.Size(piece.shard.shape), std=model.config.init_std, seed=seed)
        piece.view.copy_(piece.shard.part(whole))

    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
        list(threads.map(fill, weight_pieces(model)))  # raises what a thread has raised
