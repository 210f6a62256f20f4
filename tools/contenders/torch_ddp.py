"""torch's DistributedDataParallel around a plain Llama: gradients all-reduced in buckets beside the last backward."""

import contextlib
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from contenders.job import Job, Step, clip_and_update
from contenders.plain_llama import LlamaPart, cross_entropy, fused_adamw

__all__ = ["build"]


def build(job_json: dict[str, Any]) -> Step:
    """Weights in the job's dtype, or under the variant `autocast` fp32 weights with bf16 matrix products."""
    job = Job.from_json(job_json)
    autocast = job.variant == "autocast"
    model = LlamaPart(job).to(torch.float32 if autocast else job.torch_dtype)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    params = list(model.parameters())
    optimizer = fused_adamw(params, job)
    microbatches = job.microbatches()

    def step() -> float:
        total = 0.0
        for index, (tokens, labels) in enumerate(microbatches):
            last = index == len(microbatches) - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = ddp(tokens)
                loss = cross_entropy(logits, labels) / len(microbatches)
                loss.backward()
                total += loss.item()
        clip_and_update(params, optimizer, job)
        return total

    return step
