"""Weights that several ranks of a replica hold: their gradients are summed, and counted once in the norm.

Two kinds of copies receive a different gradient on each rank, and the weight's gradient is their sum: norms under
sequence parallelism, where each rank has its own tokens; and key-value heads that ranks share when there are fewer
heads than ranks, where each rank has its own queries. Without sequence parallelism the gradients of norms are equal
already. A tied embedding in two stages is summed by `megacoder.model.partition.sum_tied_gradients`.

These sums come at the end of a step, so data-parallel ranks cannot reduce such gradients earlier: `late_parameters`
lists them.
"""

from collections.abc import Iterator

import torch
from torch import nn

from megacoder.model.transformer import TransformerPart, WeightPiece, weight_pieces
from megacoder.parallel.collectives import all_reduce_sum
from megacoder.parallel.flat import FlatParameters

__all__ = ["counted_elsewhere", "late_parameters", "sum_copied_gradients"]


def sum_copied_gradients(model: TransformerPart) -> None:
    """Completes the gradients of copies: once per update, after the last backward and before the norm.

    One all-reduce for the whole model. A key-value head's gradient is sent at its place in the full weight, with zeros
    elsewhere: each head is then summed with its own copies, and the tensor axis's group is all that is needed.
    """
    pieces = [piece for piece in weight_pieces(model) if piece.shard.sum_copies]
    if not pieces:
        return
    wholes = [_grad(piece).new_zeros(piece.shard.shape) for piece in pieces]
    for piece, whole in zip(pieces, wholes, strict=True):
        piece.shard.part(whole).copy_(_grad(piece))
    flat = torch.cat([whole.flatten() for whole in wholes])
    all_reduce_sum(flat, model.tp.group)
    for piece, summed in zip(pieces, flat.split([whole.numel() for whole in wholes]), strict=True):
        _grad(piece).copy_(piece.shard.part(summed.view(piece.shard.shape)))


def _grad(piece: WeightPiece) -> torch.Tensor:
    if piece.param.grad is None:
        raise RuntimeError(f"{piece.hf_name} has no gradient; call after a backward")
    return piece.param.grad[piece.start : piece.start + piece.rows]


def counted_elsewhere(model: TransformerPart, flat: FlatParameters) -> Iterator[slice]:
    """Elements of the flat buffers that are copies of what another rank of the replica counts in the norm."""
    starts = {slot.name: slot.start for slot in flat.slots}
    for piece in weight_pieces(model):
        if piece.is_copy:
            first = starts[piece.param_name] + piece.view.storage_offset() - piece.param.storage_offset()
            yield slice(first, first + piece.view.numel())


def late_parameters(model: TransformerPart) -> Iterator[nn.Parameter]:
    """Parameters whose gradients are incomplete after a step's backwards, until the sums over copies."""
    for piece in weight_pieces(model):
        if piece.shard.sum_copies or (model.shares_embedding and piece.param is model.embed_tokens.weight):
            yield piece.param
