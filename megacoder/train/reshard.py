"""What each rank of a layout holds, without starting one: the code that trains, on tensors without memory.

So a checkpoint that is resharded offline is, file by file, what a run in that layout would have written. Loading does
not need it, since every checkpoint loads in every layout: it is for moving files so that each rank reads only its own,
or for a checkpoint in one file.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megacoder.checkpoint.folders import step_folders
from megacoder.checkpoint.manifest import MANIFEST
from megacoder.checkpoint.offline import write_offline
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.config import from_dict
from megacoder.core.errors import CheckpointError, ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.conversion import model_of
from megacoder.model.copies import late_parameters
from megacoder.model.partition import build_stages
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.context import UNCUT
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.tensor import TensorParallel
from megacoder.train.fragments import state_fragments
from megacoder.train.layout import Layout, LayoutRequest

__all__ = ["rank_fragments", "reshard"]


def reshard(reader: CheckpointReader, root: Path, dims: ParallelDims) -> Path:
    """Rewrites a checkpoint, as the ranks of `dims` would, into the folder of checkpoints `root`; returns its folder.

    ConfigError if the model cannot be split that way, with the nearest layouts that work, or if the step is in `root`.
    """
    if root.resolve() == reader.folder.parent.resolve() and dict(step_folders(root)).get(reader.step) is not None:
        raise ConfigError(f"{root} is where the checkpoint of step {reader.step} is now; choose another folder")
    model = model_of(reader)
    parallel, layout = _layout(reader, model, dims)
    kinds = list(dict.fromkeys(kind for kind, _ in reader.tensors()))
    ranks = (rank_fragments(model, parallel, layout, rank, kinds) for rank in range(dims.world_size))
    return write_offline(
        root, reader.step, ranks, reader.stream,
        num_ranks=dims.world_size, layout=asdict(dims), state=reader.state,
    )  # fmt: skip


def rank_fragments(
    model: ModelConfig, parallel: ParallelConfig, layout: Layout, rank: int, kinds: Sequence[str]
) -> list[Fragment]:
    """What `rank` writes of weights and moments, in its order, each on the `meta` device."""
    dims, place = layout.dims, layout.dims.coordinates(rank)
    tp = TensorParallel(rank=place.tp, size=dims.tp, sequence_parallel=parallel.sequence_parallel)
    held = layout.schedule.stage_map.stages[place.pp]
    with torch.device("meta"):
        part = build_stages(model, tp, cp=UNCUT, placement=layout.placement, held=held)[0].model
        flat = FlatParameters(
            part.named_parameters(), dtype=torch.float32, device=torch.device("meta"), num_shards=dims.dp * dims.cp,
            late=late_parameters(part), bucket_elements=parallel.bucket_elements,
        )  # fmt: skip
        state = {kind: torch.empty(flat.numel // flat.num_shards) for kind in kinds}
        owned = list(flat.owned(place.dp * dims.cp + place.cp))
        return list(state_fragments(part, owned, state, copies=False))


def _layout(reader: CheckpointReader, model: ModelConfig, dims: ParallelDims) -> tuple[ParallelConfig, Layout]:
    """With the run's own settings except for the axes; for a checkpoint that no run wrote, the default ones."""
    table = reader.state["config"]
    where = f"{reader.folder / MANIFEST}: state.config"
    parallel, seq_length, batch, micro_batch = ParallelConfig(), model.max_position_embeddings, dims.dp * dims.pp, 1
    if "parallel" in table:
        try:  # reads no more than is needed: settings come and go, checkpoints stay
            parallel = from_dict(ParallelConfig, table["parallel"], where=f"{where}.parallel")
            seq_length = int(table["data"]["stream"]["seq_length"])
            batch, micro_batch = int(table["global_batch_size"]), int(table["micro_batch_size"])
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{where}: not a run's settings, so the possible layouts are unknown") from None
    if parallel.pp != dims.pp:
        parallel = replace(parallel, layers_per_stage=None)
    parallel = replace(parallel, **asdict(dims))
    request = LayoutRequest(
        model=model, parallel=parallel, seq_length=seq_length, global_batch_size=batch, micro_batch_size=micro_batch
    )
    return parallel, request.layout(dims.world_size)
