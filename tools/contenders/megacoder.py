"""Ours: the engine with its hand-scheduled stages, under each axis alone.

In bf16 the weights are bf16; gradients, master weights and moments are fp32: more work for more precision than the
peers' pure bf16.
"""

from typing import Any

import torch
import torch.distributed as dist

from contenders.job import Job, Step
from megacoder.core.memory import keep_freed_memory
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.model.stage import Microbatch
from megacoder.ops.adamw import AdamWConfig
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World
from megacoder.train.engine import Engine
from megacoder.train.layout import LayoutRequest

__all__ = ["build"]


def build(job_json: dict[str, Any]) -> Step:
    """Variants: a schedule's name for `pp`, `sequence parallel` for `tp`."""
    job = Job.from_json(job_json)
    keep_freed_memory()  # as `megacoder train` does
    request = _request(job)
    layout = request.layout(2)
    world = World(job.rank, 2, job.rank, torch.device("cpu"), dist.group.WORLD)
    mesh = Mesh(world, layout.dims, sequence_parallel=job.variant == "sequence parallel")
    engine = Engine(
        _model(job), layout, mesh,
        execution=ExecutionConfig(), bucket_elements=request.parallel.bucket_elements, optimizer=AdamWConfig(),
        dtype=job.torch_dtype, seed=0,
    )  # fmt: skip
    microbatches = [Microbatch.of(tokens, labels) for tokens, labels in job.microbatches()]

    def step() -> float | None:
        loss_sum, num_tokens = engine.sum_losses(engine.forward_backward(microbatches))
        engine.update(lr=job.lr, num_tokens=job.num_tokens, max_grad_norm=job.max_grad_norm)
        return loss_sum / num_tokens if num_tokens else None  # a rank of the limit may have seen none

    return step


def _request(job: Job) -> LayoutRequest:
    """Layers stand where the library puts them, unless the job says where."""
    choices: dict[str, Any] = {job.row: 2, "layers_per_stage": job.layers_per_stage or None}
    if job.row == "pp":
        choices["schedule"] = job.variant
    parallel = ParallelConfig(**choices, sequence_parallel=job.variant == "sequence parallel")
    return LayoutRequest(
        model=_model(job), parallel=parallel, seq_length=job.sequence,
        global_batch_size=job.num_microbatches * job.batch, micro_batch_size=job.batch,
    )  # fmt: skip


def _model(job: Job) -> ModelConfig:
    return ModelConfig(
        vocab_size=job.vocab_size, hidden_size=job.hidden_size, intermediate_size=job.intermediate_size,
        num_hidden_layers=job.num_layers, num_attention_heads=job.num_heads, num_key_value_heads=job.num_heads,
        head_dim=job.head_dim, max_position_embeddings=job.sequence, rope_theta=10000.0,
    )  # fmt: skip
