"""A model cut into the stages of a pipeline: which part a rank holds, and as which kind of stage.

Both kinds hold the same parameters under the same names and give the same gradients up to rounding; they differ in who
writes the backward. "scheduled" is the fast one, its backward written out by hand; "plain" runs the layers' own
`forward` under autograd, for those who change the block's code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from megacoder.model.config import ModelConfig
from megacoder.model.plain_stage import PlainStage
from megacoder.model.scheduled import Recompute, grad_of
from megacoder.model.stage import ModelStage, Stage
from megacoder.model.transformer import TransformerPart
from megacoder.parallel.collectives import group_rank, sum_with_peer
from megacoder.parallel.context import UNCUT, ContextParallel
from megacoder.parallel.schedules.placement import Placement
from megacoder.parallel.schedules.schedule import StageMap
from megacoder.parallel.tensor import ALONE, TensorParallel

__all__ = ["ExecutionConfig", "build_stages", "sum_tied_gradients"]

KINDS: dict[str, type[ModelStage]] = {"scheduled": Stage, "plain": PlainStage}


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How layers run; no choice changes a result but by rounding."""

    block: Literal["scheduled", "plain"] = "scheduled"
    """who writes the backward: this library by hand, or autograd (slower; for those who change the block's code)"""
    recompute: Recompute = "none"
    """what a layer forms again in its backward rather than keeps: nothing, its widest tensors, or all"""


def build_stages(
    config: ModelConfig,
    tp: TensorParallel = ALONE,
    *,
    cp: ContextParallel = UNCUT,
    placement: Placement,
    held: Sequence[int],
    execution: ExecutionConfig = ExecutionConfig(),
) -> list[ModelStage]:
    """The stages numbered `held`, which one rank has, over one common `model` with empty weights."""
    model = TransformerPart(
        config,
        tp,
        cp=cp,
        layers=[layer for stage in sorted(held) for layer in placement.layers(stage)],
        embedding=any(map(placement.has_embedding, held)),
        head=any(map(placement.has_head, held)),
    )
    return [
        KINDS[execution.block](
            model=model, layers=placement.layers(stage), recompute=execution.recompute,
            is_first=placement.has_embedding(stage), is_last=placement.has_head(stage),
        )
        for stage in held
    ]  # fmt: skip


def sum_tied_gradients(model: TransformerPart, *, stage_map: StageMap, group: dist.ProcessGroup | None) -> None:
    """Adds up the gradients of a tied embedding's two copies, once per update, where two ranks hold them.

    Every rank of the pipeline may call it; those that have nothing to do return at once.
    """
    ends = (stage_map.home[0][0], stage_map.home[-1][0])
    rank = group_rank(group)
    if model.config.tie_word_embeddings and group is not None and ends[0] != ends[1] and rank in ends:
        sum_with_peer(grad_of(model.embed_tokens.weight), ends[0] + ends[1] - rank, group)
