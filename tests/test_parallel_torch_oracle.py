"""torch.distributed.pipelining as an oracle: under torch's schedules a model has the losses and gradients of ours.

torch splits a batch, runs its own autograd stages and moves tensors itself; weights and layers alone are shared.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import named_grads, pipeline_config
from torch import nn

from megacoder.model.init import init_weights
from megacoder.model.partition import build_stages
from megacoder.model.places import Places
from megacoder.model.stage import Microbatch
from megacoder.parallel.context import UNCUT
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.pipeline import PipelineRunner
from megacoder.parallel.schedules.generators import build_schedule
from megacoder.parallel.schedules.placement import place_evenly
from megacoder.parallel.schedules.program import build_program
from megacoder.parallel.tensor import ALONE

NUM_MICROBATCHES, BATCH, LENGTH = 4, 2, 8
CONFIG = pipeline_config(5)
CLASSES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B"}


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (NUM_MICROBATCHES * BATCH, LENGTH + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Part(nn.Module):
    """A stage as torch wants it: a module from what enters to what leaves."""

    def __init__(self, stage):
        super().__init__()
        self.model, self.stage = stage.model, stage

    def forward(self, x):
        stream = self.model.embed_tokens(x) if self.stage.is_first else x
        places = Places.of((BATCH, LENGTH), device=x.device)
        for index in self.stage.layers:
            stream = self.model.decoder_layers()[index](stream, self.model.rope(x.device), places)
        if self.stage.is_last:
            return F.linear(self.model.norm(stream), self.model.lm_head.weight[: CONFIG.vocab_size])
        return stream


def stages_of(schedule, rank):
    """One model for each stage, as torch's stages own their modules."""
    num_stages = schedule.stage_map.num_stages
    placement = place_evenly(CONFIG.num_hidden_layers, num_stages)
    stages = []
    for number in schedule.stage_map.stages[rank]:
        [stage] = build_stages(CONFIG, ALONE, cp=UNCUT, placement=placement, held=[number])
        init_weights(stage.model, seed=3)
        stages.append(stage)
    return stages


def gradients(stages):
    return {name: grad for stage in stages for name, grad in named_grads(stage.model).items()}


def with_torch(world, name, schedule):
    from torch.distributed.pipelining import PipelineStage, schedules

    stages = stages_of(schedule, world.rank)
    numbers = schedule.stage_map.stages[world.rank]
    theirs = [
        PipelineStage(Part(stage), number, schedule.stage_map.num_stages, world.device, group=world.group)
        for stage, number in zip(stages, numbers, strict=True)
    ]
    losses = []

    def loss_of(logits, labels):
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        losses.append(loss.item())
        return loss

    runner = getattr(schedules, CLASSES[name])(
        theirs if name == "interleaved" else theirs[0], NUM_MICROBATCHES, loss_fn=loss_of, scale_grads=False
    )
    tokens, labels = batch()
    runner.step(*([tokens] if stages[0].is_first else []), target=labels)
    return losses[-NUM_MICROBATCHES:], gradients(stages)  # it also tries the loss out, to learn of shapes


def with_ours(world, schedule):
    stages = stages_of(schedule, world.rank)
    for stage in stages:
        FlatParameters(stage.model.named_parameters(), dtype=torch.float32, device=world.device)
    tokens, labels = batch()
    microbatches = [Microbatch(*pair) for pair in zip(tokens.split(BATCH), labels.split(BATCH), strict=True)]
    outputs = PipelineRunner(build_program(schedule), stages, world.group).run(microbatches).outputs
    return [loss.total.item() for loss in outputs], gradients(stages)


def both(world, name):
    schedule = build_schedule(name, num_ranks=world.size, num_microbatches=NUM_MICROBATCHES)
    return with_torch(world, name, schedule), with_ours(world, schedule)


@pytest.mark.parametrize("name", CLASSES)
def test_torch_computes_the_same_losses_and_gradients(ranks, name):
    num_compared = 0
    for (losses, expected), (our_losses, found) in ranks.run(2, both, name):
        assert our_losses == pytest.approx(losses, rel=1e-6)
        assert found.keys() == expected.keys()
        for hf_name, grad in found.items():
            assert (grad - expected[hf_name]).norm() <= 1e-5 * expected[hf_name].norm(), hf_name
            num_compared += 1
    assert num_compared == 9 * CONFIG.num_hidden_layers + 3
