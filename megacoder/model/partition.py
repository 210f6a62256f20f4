"""A model cut into the stages of a pipeline: which part a rank holds, and as which kind of stage.

Both kinds hold the same parameters under the same names and give the same gradients up to rounding; they differ in who
writes the backward. "scheduled" is the fast one, its backward written out by hand; "plain" runs the layers' own
`forward` under autograd, for those who change the block's code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.kept import Recompute
from megacoder.model.plain_stage import PlainStage
from megacoder.model.scheduled import grad_of
from megacoder.model.stage import ModelStage, Stage
from megacoder.model.transformer import TransformerPart
from megacoder.ops.fp8 import MULTIPLE, check_fp8_machine
from megacoder.ops.linear import Precision
from megacoder.parallel.collectives import group_rank, sum_with_peer
from megacoder.parallel.context import ContextParallel
from megacoder.parallel.schedules.placement import Placement
from megacoder.parallel.schedules.schedule import StageMap
from megacoder.parallel.tensor import TensorParallel

__all__ = ["ExecutionConfig", "build_stages", "sum_tied_gradients"]

KINDS: dict[str, type[ModelStage]] = {"scheduled": Stage, "plain": PlainStage}


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How layers run. Choices change results only by rounding, which is coarse in fp8."""

    block: Literal["scheduled", "plain"] = "scheduled"
    """scheduled: this library's hand-written backward; plain: autograd (slower; for changing the block's code)"""
    recompute: Recompute = "none"
    """what a layer recomputes in its backward instead of keeping: nothing, norms, also its widest tensors, or all.
    zb-h1, zbv and dualpipev then postpone only the weight gradients for which there is room, and idle more"""
    fp8: bool = False
    """compute the layers' matrix products in fp8, cast from bfloat16; attention, embedding and head do not use fp8"""
    cuda_graph: bool = False
    """record a microbatch's forward and backward once as a CUDA graph and replay it, so that short kernels do not wait
    for the host; each rank must hold the whole model, without document masks. Not yet run on a GPU"""

    def __post_init__(self) -> None:
        if self.recompute == "norms" and self.block == "plain":
            raise ConfigError('execution.recompute = "norms" needs execution.block = "scheduled"; or use "selective"')
        if self.fp8 and self.block == "plain":
            raise ConfigError('execution.fp8 = true needs execution.block = "scheduled": plain layers are not cast')
        if self.cuda_graph and self.block == "plain":
            raise ConfigError('execution.cuda_graph = true needs execution.block = "scheduled"')

    @property
    def precision(self) -> Precision:
        """What the layers' matrix products run in."""
        return Precision(fp8=self.fp8)

    def check_sizes(self, model: ModelConfig, *, tp: int, tokens: int | None = None) -> None:
        """ConfigError where fp8 cannot multiply a rank's share of the matrices, or `tokens` tokens of a microbatch."""
        local = model.local_sizes(tp)
        sizes = {
            "hidden_size": model.hidden_size,
            "intermediate_size": local.feed_forward,
            "num_attention_heads * head_dim": local.attention,
            "(num_attention_heads + 2 num_key_value_heads) * head_dim": local.qkv,
            "tokens of a microbatch": tokens or 0,
        }
        for name, size in sizes.items():
            if self.fp8 and size % MULTIPLE:
                share = f" (per rank at tp = {tp})" if tp > 1 else ""
                raise ConfigError(f"execution.fp8 = true: {name} = {size}{share} is not a multiple of {MULTIPLE}")

    def check_machine(self, device_type: str, dtype: torch.dtype) -> None:
        """ConfigError where devices of this type have no fp8 or no CUDA graphs, or fp8 cannot be cast from `dtype`."""
        if self.cuda_graph and device_type != "cuda":
            raise ConfigError(f"execution.cuda_graph = true needs a GPU; this run is on {device_type}")
        if self.fp8 and dtype != torch.bfloat16:
            name = str(dtype).removeprefix("torch.")
            raise ConfigError(f'execution.fp8 = true casts from bfloat16: it needs dtype = "bfloat16", not "{name}"')
        if self.fp8:
            check_fp8_machine(device_type)


def build_stages(
    config: ModelConfig,
    tp: TensorParallel,
    *,
    cp: ContextParallel,
    placement: Placement,
    held: Sequence[int],
    execution: ExecutionConfig = ExecutionConfig(),
) -> list[ModelStage]:
    """One rank's stages, numbered `held`, which share one `TransformerPart` with empty weights."""
    execution.check_sizes(config, tp=tp.size)
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
            model=model, layers=placement.layers(stage), recompute=execution.recompute, precision=execution.precision,
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
