"""The folder of a run: its resolved configuration, which a later start must match, and its checkpoints.

State goes to disk in parameter space, under Hugging Face names, so that any number of ranks can go on from it: a rank
writes the ranges of each weight that its slice of the flat buffers holds, and reads the ranges that it holds now.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.folders import step_folders
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.checkpoint.writer import CheckpointWriter
from megacoder.core.config import check_same, load_toml, to_dict, to_toml
from megacoder.core.files import exclusive, write_text
from megacoder.data.prefetch import Prefetcher
from megacoder.data.stream import merge_states
from megacoder.model.transformer import Transformer, TransformerPart, WeightPiece, weight_pieces
from megacoder.parallel.collectives import barrier, gather_json
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.zero import Zero1AdamW
from megacoder.train.config import RunConfig
from megacoder.train.engine import Engine

__all__ = ["RunFolder", "load_weights", "state_fragments"]

FREE_TO_CHANGE = {
    "output", "device", "checkpoint_every", "checkpoint", "eval_every", "eval_batches", "log_every",
    "execution", "micro_batch_size", "parallel", "timeout_seconds",
}  # fmt: skip
"""Settings that may differ when a run goes on: they change nothing, or rounding alone (device, layout, execution)."""


class RunFolder:
    """`config.output`; creating it checks that what is there belongs to the same run."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        world = mesh.world
        self.config, self.mesh = config, mesh
        self._held = ExitStack()
        if world.is_first:
            self._held.enter_context(exclusive(config.output, what="run"))
        path = config.output / "run.toml"
        if path.exists():
            old = load_toml(RunConfig, path)
            check_same(old, config, where=str(path), free=FREE_TO_CHANGE, advice="choose another output")
        barrier(world.group)  # every rank has read the old file before the first writes a new one
        if world.is_first:
            write_text(path, to_toml(config))
        self.checkpoints = CheckpointWriter(config.output / "checkpoints", world, config.checkpoint)

    def resume(self, engine: Engine, batches: Prefetcher) -> int:
        """Loads the newest whole checkpoint if there is one; returns the step it was taken at, 0 for a new run."""
        root = self.config.output / "checkpoints"
        if not step_folders(root):
            return 0
        reader = CheckpointReader(root)
        optimizer = engine.optimizer
        reader.read_all(state_fragments(engine.model, optimizer, optimizer.state(), copies=True))
        optimizer.publish_master()
        optimizer.num_updates = reader.state["num_updates"]
        batches.load_state_dict(reader.state["data"])
        return reader.step

    def save(self, step: int, engine: Engine, batches: Prefetcher) -> None:
        """Starts a checkpoint; it is on disk after the next `save` or `finish`."""
        ours = batches.state_dict() if self.mesh.speaks_for_replica else None
        positions = gather_json(ours, self.mesh.world)
        state = {
            "num_updates": engine.optimizer.num_updates,
            "data": merge_states([position for position in positions if position is not None]),
            "config": to_dict(self.config),
        }
        optimizer = engine.optimizer
        fragments = list(state_fragments(engine.model, optimizer, optimizer.state(), copies=False))
        self.checkpoints.save(step, fragments, state=state, layout=asdict(self.mesh.dims))

    def finish(self) -> None:
        """Waits until the last checkpoint is whole, and lets the folder go."""
        self.checkpoints.wait()
        self._held.close()


@torch.no_grad()
def load_weights(model: Transformer, checkpoints: Path) -> int:
    """Fills `model` from the master weights of a checkpoint, or of the newest in a folder of them; returns its step."""
    reader = CheckpointReader(checkpoints)
    for param in model.parameters():
        param.zero_()  # the rows that pad the vocabulary are in no file
    for piece in weight_pieces(model):
        piece.view.copy_(piece.shard.part(reader.read_tensor(piece.hf_name)))
    return reader.step


def state_fragments(
    model: TransformerPart, optimizer: Zero1AdamW, state: dict[str, Tensor], *, copies: bool
) -> Iterator[Fragment]:
    """This rank's part of every weight in each tensor of `state`, which hold the optimizer's own elements by kind.

    The rows that pad the vocabulary are no part of any. Without `copies`, what several ranks of a replica hold is the
    first one's alone, since a file has it once.
    """
    pieces: dict[str, list[WeightPiece]] = defaultdict(list)
    for piece in weight_pieces(model):
        if copies or not piece.is_copy:
            pieces[piece.param_name].append(piece)
    for owned in optimizer.owned:
        for piece in pieces[owned.slot.name]:
            shard = piece.shard
            first = int(piece.view.storage_offset() - owned.slot.param.storage_offset())
            start, stop = max(owned.start, first), min(owned.stop, first + piece.view.numel())
            if start >= stop:
                continue
            offset = owned.offset + start - owned.start
            for kind, values in state.items():
                yield Fragment(
                    name=piece.hf_name, kind=kind, global_shape=shard.shape,
                    region=Box(shard.offsets, shard.local_shape),
                    start=start - first, stop=stop - first, data=values[offset : offset + stop - start],
                )  # fmt: skip
