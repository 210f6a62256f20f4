"""What a checkpoint holds of a model: weights and optimizer state in parameter space, under Hugging Face names.

So any number of ranks can resume from it: a rank writes the ranges of each weight that its slice of the flat buffers
holds, and reads the ranges that it holds now.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.model.transformer import Transformer, TransformerPart, WeightPiece, weight_pieces
from megacoder.parallel.flat import OwnedRange

__all__ = ["load_weights", "state_fragments"]


def state_fragments(
    model: TransformerPart, owned: Iterable[OwnedRange], state: dict[str, Tensor], *, copies: bool
) -> Iterator[Fragment]:
    """A rank's part of every weight, for each kind in `state`, whose tensors hold the elements that the rank `owned`.

    The rows that pad the vocabulary are left out. Without `copies`, what several ranks of a replica hold comes from the
    first of them only, since a checkpoint has it once.
    """
    pieces: dict[str, list[WeightPiece]] = defaultdict(list)
    for piece in weight_pieces(model):
        if copies or not piece.is_copy:
            pieces[piece.param_name].append(piece)
    for part in owned:
        for piece in pieces[part.slot.name]:
            shard = piece.shard
            first = int(piece.view.storage_offset() - part.slot.param.storage_offset())
            start, stop = max(part.start, first), min(part.stop, first + piece.view.numel())
            if start >= stop:
                continue
            offset = part.offset + start - part.start
            for kind, values in state.items():
                yield Fragment(
                    name=piece.hf_name, kind=kind, global_shape=shard.shape,
                    region=Box(shard.offsets, shard.local_shape),
                    start=start - first, stop=stop - first, data=values[offset : offset + stop - start],
                )  # fmt: skip


@torch.no_grad()
def load_weights(model: Transformer, reader: CheckpointReader) -> None:
    """Fills `model` from the master weights of a checkpoint."""
    for param in model.parameters():
        param.zero_()  # the rows that pad the vocabulary are in no file
    for piece in weight_pieces(model):
        piece.view.copy_(piece.shard.part(reader.read_tensor(piece.hf_name)))
