"""One rank's share of a training step: its stages, the pipeline that runs them, and the optimizer of its weights.

Everything that makes a layout equal to one process meets here. A step is: microbatches through the pipeline, which
adds gradient sums into the flat buffer; sums over the ranks of a replica for weights that several of them hold; one
ZeRO-1 update over data and context parallel ranks, which divides by the tokens of the whole global batch.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import repeat

import torch

from megacoder.data.stream import Batch
from megacoder.model.config import ModelConfig
from megacoder.model.init import init_weights
from megacoder.model.partition import ExecutionConfig, build_stages, sum_tied_gradients
from megacoder.model.replicas import counted_elsewhere, sum_replica_gradients
from megacoder.model.stage import ForwardOnly, Microbatch
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.cross_entropy import LossSum
from megacoder.parallel.collectives import World, all_reduce_sum, group_rank, group_size
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.pipeline import PipelineRunner
from megacoder.parallel.zero import Zero1AdamW
from megacoder.train.layout import Layout

__all__ = ["Engine"]


class Engine:
    """What one rank computes with; all ranks of `mesh` make one and make the same calls."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        mesh: Mesh,
        *,
        execution: ExecutionConfig,
        optimizer: AdamWConfig,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        """Weights are drawn from `seed`, the same for every layout."""
        self.mesh, self.layout = mesh, layout
        stage_map = layout.schedule.stage_map
        stages = build_stages(
            config, mesh.tp, cp=mesh.cp,
            placement=layout.placement, held=stage_map.stages[mesh.place.pp], execution=execution,
        )  # fmt: skip
        self.model = stages[0].model
        """the layers of this rank's stages"""
        init_weights(self.model, seed=seed)
        shards = mesh.group("dp", "cp")
        self.flat = FlatParameters(
            self.model.named_parameters(), dtype=dtype, device=mesh.world.device, num_shards=group_size(shards)
        )
        self.optimizer = Zero1AdamW(
            self.flat, World(group_rank(shards), group_size(shards), 0, mesh.world.device, shards), optimizer,
            tensor_group=mesh.group("pp", "tp"), counted_elsewhere=counted_elsewhere(self.model, self.flat),
        )  # fmt: skip
        self._stages = stages
        self._training = PipelineRunner(layout.program, stages, mesh.group("pp"))

    def microbatches(self, batch: Batch, size: int) -> list[Microbatch]:
        """The batch of this rank's replica in parts of `size` sequences, and of each the tokens that this rank has."""
        device, cp = self.mesh.world.device, self.mesh.cp
        tokens, labels = (whole.to(device).split(size) for whole in (batch.tokens, batch.labels))
        starts = repeat(None) if batch.starts is None else batch.starts.to(device).split(size)
        return [
            Microbatch.of(tokens_BS, labels_BS, cp=cp, starts_BS=starts_BS)
            for tokens_BS, labels_BS, starts_BS in zip(tokens, labels, starts, strict=False)
        ]

    def forward_backward(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """Adds the gradients of all microbatches; returns this rank's part of the replica's loss (see `sum_losses`)."""
        outputs = self._training.run(microbatches).outputs
        sum_replica_gradients(self.model)
        sum_tied_gradients(self.model, stage_map=self.layout.schedule.stage_map, group=self.mesh.group("pp"))
        return self._part(outputs)

    def evaluate(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """The same part of the loss, without gradients."""
        return self._part(self._evaluation.run(microbatches).outputs)

    def sum_losses(self, part: LossSum, *flags: float) -> list[float]:
        """[loss sum, tokens, *flags] over all ranks of the run, of `part`s that the methods above returned."""
        sums = torch.stack([part.total, *(part.total.new_tensor(value) for value in (part.num_tokens, *flags))])
        all_reduce_sum(sums, self.mesh.world.group)
        return sums.tolist()

    def update(self, *, lr: float, num_tokens: int, max_grad_norm: float) -> float:
        """One optimizer step; the gradient's norm before clipping, inf where the update was left out."""
        return self.optimizer.step(lr=lr, num_tokens=num_tokens, max_grad_norm=max_grad_norm)

    @cached_property
    def _evaluation(self) -> PipelineRunner:
        stages = [ForwardOnly(stage) for stage in self._stages]
        return PipelineRunner(self.layout.evaluation_program, stages, self.mesh.group("pp"))

    def _part(self, outputs: Sequence[LossSum]) -> LossSum:
        """Ranks that hold the head have losses, tensor-parallel ones all the same: the first of them counts."""
        counted = outputs if self.mesh.place.tp == 0 else ()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.world.device)
        for loss in counted:
            total += loss.total
        return LossSum(total, sum(loss.num_tokens for loss in counted))
