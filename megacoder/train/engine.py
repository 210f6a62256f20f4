"""One rank's share of a training step: its stages, the pipeline that runs them, and the optimizer of its weights.

Everything that makes a layout equal to one process meets here. A step is: microbatches through the pipeline, which
adds gradient sums into the flat buffer; sums over the ranks of a replica for weights that several of them hold; one
ZeRO-1 update over data and context parallel ranks, which divides by the tokens of the whole global batch.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch

from megacoder.core.memory import return_freed_memory
from megacoder.data.stream import Batch
from megacoder.model.config import ModelConfig
from megacoder.model.copies import counted_elsewhere, late_parameters, sum_copied_gradients
from megacoder.model.graphed_stage import GraphedStage
from megacoder.model.init import init_weights
from megacoder.model.partition import ExecutionConfig, build_stages, sum_tied_gradients
from megacoder.model.stage import ForwardOnly, Microbatch, Stage
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.cross_entropy import LossSum, count_labels
from megacoder.parallel.collectives import all_reduce_sum, group_size
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.pipeline import PipelineRunner, PipelineStage
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
        bucket_elements: int,
        optimizer: AdamWConfig,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        """Weights are drawn from `seed`, the same for every layout; ConfigError if `execution` cannot run here."""
        execution.check_machine(mesh.world.device.type, dtype)
        self.mesh, self.layout = mesh, layout
        stage_map = layout.schedule.stage_map
        stages = build_stages(
            config, mesh.tp, cp=mesh.cp,
            placement=layout.placement, held=stage_map.stages[mesh.place.pp], execution=execution,
        )  # fmt: skip
        self.model = stages[0].model
        """the layers of this rank's stages"""
        shards = mesh.group("dp", "cp")
        self.flat = FlatParameters(
            self.model.named_parameters(), dtype=dtype, device=mesh.world.device,
            num_shards=group_size(shards), late=late_parameters(self.model), bucket_elements=bucket_elements,
        )  # fmt: skip
        init_weights(self.model, seed=seed)  # only now, so that weights never exist in both fp32 and `dtype`
        self.optimizer = Zero1AdamW(
            self.flat, shards, optimizer,
            norm_group=mesh.world.group, counted_elsewhere=counted_elsewhere(self.model, self.flat),
        )  # fmt: skip
        if mesh.world.device.type == "cpu":
            return_freed_memory()
        self._is_first_update = True
        self._stages = [replace(stage, events=self.optimizer.traffic) for stage in stages]
        training: Sequence[PipelineStage] = self._stages
        if execution.cuda_graph:
            assert isinstance(stages[0], Stage)  # checked by `RunConfig.layout`
            training = [GraphedStage(stage=stages[0])]
        self._training = PipelineRunner(layout.program, training, mesh.group("pp"), journal=mesh.world.journal)

    def microbatches(self, batch: Batch, size: int) -> list[Microbatch]:
        """This rank's part of its replica's batch, `size` sequences at a time.

        IndexError for a label outside the vocabulary. What the host must know about labels and documents is computed
        here, before they go to the GPU: reading anything back from a GPU makes the host wait.
        """
        device, cp, vocab = self.mesh.world.device, self.mesh.cp, self.model.config.vocab_size
        counts = [count_labels(cp.part(labels), vocab) for labels in batch.labels.split(size)]
        tokens, labels = (tensor.to(device).split(size) for tensor in (batch.tokens, batch.labels))
        starts = [None] * len(tokens) if batch.starts is None else batch.starts.split(size)
        return [
            Microbatch.of(*pair, cp=cp, starts_BS=first, num_labels=count)
            for *pair, first, count in zip(tokens, labels, starts, counts, strict=True)
        ]

    def forward_backward(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """Adds the gradients of all microbatches; returns this rank's part of the replica's loss (see `sum_losses`)."""
        return self._sum(self.forward_backward_each(microbatches))

    def forward_backward_each(self, microbatches: Sequence[Microbatch]) -> Sequence[LossSum]:
        """The same; returns that part by microbatch, none on ranks that have none."""
        self.optimizer.traffic.begin_step(len(microbatches))
        outputs = self._training.run(microbatches).outputs
        self.mesh.world.journal.at("sums over ranks")
        sum_copied_gradients(self.model)
        sum_tied_gradients(self.model, stage_map=self.layout.schedule.stage_map, group=self.mesh.group("pp"))
        return self._counted(outputs)

    def evaluate(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """The same part of the loss, without gradients."""
        return self._sum(self._counted(self._evaluation.run(microbatches).outputs))

    def sum_losses(self, part: LossSum, *flags: float) -> list[float]:
        """[loss sum, tokens, *flags] over all ranks of the run, of `part`s that the methods above returned."""
        sums = torch.stack([part.total, *(part.total.new_full((), value) for value in (part.num_tokens, *flags))])
        all_reduce_sum(sums, self.mesh.world.group)
        return sums.tolist()

    def update(
        self, *, lr: float, num_tokens: int, max_grad_norm: float, skip_above: float = sys.float_info.max
    ) -> float:
        """One optimizer step, or none (see `Zero1AdamW.step`); the gradient's norm before clipping."""
        norm = self.optimizer.step(lr=lr, num_tokens=num_tokens, max_grad_norm=max_grad_norm, skip_above=skip_above)
        if self._is_first_update and self.mesh.world.device.type == "cpu":
            return_freed_memory()  # what the first step freed lies between what it left, such as libraries' caches
        self._is_first_update = False
        return norm

    @cached_property
    def _evaluation(self) -> PipelineRunner:
        stages = [ForwardOnly(stage) for stage in self._stages]
        return PipelineRunner(
            self.layout.evaluation_program, stages, self.mesh.group("pp"), journal=self.mesh.world.journal
        )

    def _counted(self, outputs: Sequence[LossSum]) -> Sequence[LossSum]:
        """Ranks that hold the head have losses; tensor-parallel ranks all have the same, so the first one's count."""
        return outputs if self.mesh.place.tp == 0 else ()

    def _sum(self, losses: Sequence[LossSum]) -> LossSum:
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.world.device)
        for loss in losses:
            total += loss.total
        return LossSum(total, sum(loss.num_tokens for loss in losses))
