"""torch.distributed.pipelining around a plain Llama cut by hand, layers placed by cost as ours are."""

from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble

from contenders.job import Job, Step, clip_and_update
from contenders.plain_llama import LlamaPart, cross_entropy, fused_adamw

__all__ = ["build"]


class AutocastPart(nn.Module):
    """A part that computes in bf16 from fp32 weights; fp32 crosses stages, as autocast leaves residual sums."""

    def __init__(self, part: LlamaPart) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.part(x)


def build(job_json: dict[str, Any]) -> Step:
    """Variants: `1f1b`, `zbv`, each also with ` autocast`."""
    job = Job.from_json(job_json)
    schedule_name, _, autocast = job.variant.partition(" ")
    counts = job.layers_per_stage
    held = [job.rank] if schedule_name == "1f1b" else [job.rank, 3 - job.rank]  # the V of zero bubble
    stages: list[Any] = []
    parts = []
    for index in held:
        part = LlamaPart(
            job, range(counts[index]), embedding=index == 0, head=index == len(counts) - 1
        ).to(torch.float32 if autocast else job.torch_dtype)  # fmt: skip
        parts.append(part)
        stages.append(PipelineStage(AutocastPart(part) if autocast else part, index, len(counts), torch.device("cpu")))
    params = [param for part in parts for param in part.parameters()]
    optimizer = fused_adamw(params, job)
    schedule: Any
    if schedule_name == "1f1b":
        schedule = Schedule1F1B(stages[0], job.num_microbatches, loss_fn=cross_entropy)
    else:
        schedule = ScheduleZBVZeroBubble(stages, job.num_microbatches, loss_fn=cross_entropy)
    tokens, labels = (torch.cat(whole) for whole in zip(*job.microbatches(), strict=True))
    first, last = 0 in held, len(counts) - 1 in held

    def step() -> float | None:
        losses: list[torch.Tensor] = []
        schedule.step(*([tokens] if first else []), **({"target": labels, "losses": losses} if last else {}))
        clip_and_update(params, optimizer, job, shared=True)
        return torch.stack(losses).mean().item() if last else None

    return step
