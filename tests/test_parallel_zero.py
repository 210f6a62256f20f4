"""ZeRO-1 on 1 to 4 ranks against one process, and one process against torch's AdamW on the plain model in fp64.

Every rank holds its share of the same 12 sequences; ranks and microbatches have unequal numbers of trained tokens, and
one sequence has none, so that a mean taken anywhere but over the global batch is seen.
"""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from test_model import tiny
from tiny_models import make_model
from torch import Tensor, nn

from megacoder.model.stage import forward_backward
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.parallel.collectives import all_reduce_sum
from megacoder.parallel.flat import ALIGNMENT, FlatParameters
from megacoder.parallel.world import World
from megacoder.parallel.zero import Zero1AdamW

CPU = torch.device("cpu")
WORLD_OF_ONE = World(0, 1, 0, CPU, None)
CONFIG = AdamWConfig(eps=1e-5)  # gradients near a smaller one turn rounding errors into steps
NUM_SEQUENCES = 12
LEARNING_RATES = [2e-3, 3e-3, 1e-3]
CLIPPED, UNCLIPPED = 0.2, 100.0
SIZES = [1, 2, 3, 4]


def global_batch(step):
    """(tokens, labels) of 12 sequences; sequence 9 is ignored whole, the others all but 2 to 18 labels."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 101, (NUM_SEQUENCES, 21), generator=generator)
    labels = tokens[:, 1:].clone()
    for sequence in range(NUM_SEQUENCES):
        labels[sequence, : 20 if sequence == 9 else (7 * sequence + step) % 17 + 2] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), labels


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one rank saw of a training."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    """this rank's slices"""


class Replica:
    """One rank's model, flat buffers and optimizer."""

    def __init__(self, world, *, dtype=torch.float32, seed=0):
        self.world = world
        self.model = make_model(tiny(num_hidden_layers=2), seed=seed)
        self.flat = FlatParameters(self.model.named_parameters(), dtype=dtype, device=CPU, num_shards=world.size)
        self.optimizer = Zero1AdamW(self.flat, world.group, CONFIG)

    def accumulate(self, step, micro_batch_size):
        """Adds the gradients of this rank's share: (mean loss over the global batch, its trained tokens)."""
        sums = torch.zeros(2, dtype=torch.float64)
        share = NUM_SEQUENCES // self.world.size
        tokens, labels = (part[self.world.rank * share :][:share] for part in global_batch(step))
        for micro in zip(tokens.split(micro_batch_size), labels.split(micro_batch_size), strict=True):
            loss = forward_backward(self.model, *micro)
            sums += torch.stack([loss.total, torch.tensor(float(loss.num_tokens), dtype=torch.float64)])
        all_reduce_sum(sums, self.world.group)
        return (sums[0] / sums[1]).item(), int(sums[1])

    def update(self, step, *, micro_batch_size=1, max_grad_norm=UNCLIPPED):
        """One global batch: (loss, gradient norm)."""
        loss, num_tokens = self.accumulate(step, micro_batch_size)
        return loss, self.optimizer.step(lr=LEARNING_RATES[step], num_tokens=num_tokens, max_grad_norm=max_grad_norm)

    def snapshot(self):
        """(weights, this rank's state), cloned."""
        state = {kind: values.clone() for kind, values in self.optimizer.state().items()}
        return {slot.name: slot.param.detach().clone() for slot in self.flat.slots}, state


def train(world, dtype, micro_batch_size, max_grad_norm):
    """Three updates on this rank's share."""
    replica = Replica(world, dtype=dtype)
    steps = [
        replica.update(step, micro_batch_size=micro_batch_size, max_grad_norm=max_grad_norm)
        for step in range(len(LEARNING_RATES))
    ]
    assert not replica.flat.grad.any()
    weights, state = replica.snapshot()
    losses, norms = map(list, zip(*steps, strict=True))
    return Trained(losses=losses, norms=norms, weights=weights, state=state)


def train_plainly(max_grad_norm):
    """The same by torch alone: autograd, clip_grad_norm_ and AdamW in fp64, the whole batch at once."""
    model = make_model(tiny(num_hidden_layers=2)).double()
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps, weight_decay=CONFIG.weight_decay,
    )  # fmt: skip
    losses, norms = [], []
    for step, lr in enumerate(LEARNING_RATES):
        tokens, labels = global_batch(step)
        optimizer.zero_grad()
        loss = model.loss(tokens, labels) / (labels != IGNORE_INDEX).sum()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return Trained(losses=losses, norms=norms, weights=dict(model.named_parameters()), state={})


def assert_near(actual, expected, tolerance):
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance)
    assert actual.norms == pytest.approx(expected.norms, rel=tolerance)
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in actual.weights.items():
        error = (weight.double() - expected.weights[name].double()).norm() / expected.weights[name].double().norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same_bits(actual, expected):
    assert (actual.losses, actual.norms) == (expected.losses, expected.norms)
    for name, weight in expected.weights.items():
        assert torch.equal(actual.weights[name], weight), name


def train_alone(world, *args):
    """`train` without a group, on the one thread that a rank has."""
    return train(WORLD_OF_ONE, *args)


@pytest.fixture(scope="module")
def alone(ranks):
    """What one process makes of `train`'s arguments, each computed once."""
    return functools.cache(lambda *args: ranks.run(1, train_alone, *args)[0])


@pytest.mark.parametrize("max_grad_norm", [CLIPPED, UNCLIPPED])
def test_one_process_equals_plain_torch(alone, max_grad_norm):
    actual = alone(torch.float32, 5, max_grad_norm)
    assert all(CLIPPED < norm < UNCLIPPED for norm in actual.norms)
    assert_near(actual, train_plainly(max_grad_norm), 1e-6)


@pytest.mark.parametrize("max_grad_norm", [CLIPPED, UNCLIPPED])
@pytest.mark.parametrize("size", SIZES)
def test_any_number_of_ranks_equals_one_process(ranks, alone, size, max_grad_norm):
    results = ranks.run(size, train, torch.float32, 2, max_grad_norm)
    assert_near(results[0], alone(torch.float32, 5, max_grad_norm), 1e-6)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("size", SIZES)
def test_bf16_weights_are_the_rounded_master_weights(ranks, alone, size):
    results = ranks.run(size, train, torch.bfloat16, 1, CLIPPED)
    expected = alone(torch.bfloat16, 1, CLIPPED)
    assert results[0].losses == pytest.approx(expected.losses, rel=1e-5)
    assert results[0].norms == pytest.approx(expected.norms, rel=1e-4)
    master, flat = (torch.cat([result.state["weight"] for result in trained]) for trained in (results, [expected]))
    assert (master[: len(flat)] - flat).norm() <= 1e-6 * flat.norm()  # beyond lies the padding of more shards
    start = 0
    for weight in results[0].weights.values():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.flatten(), master[start : start + weight.numel()].bfloat16())
        start += -(-weight.numel() // ALIGNMENT) * ALIGNMENT
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_run_twice_gives_the_same_bits(ranks, dtype):
    first, second = (ranks.run(3, train, dtype, 2, CLIPPED) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(other, one)
        for kind, values in one.state.items():
            assert torch.equal(other.state[kind], values), kind


def update_with_a_bad_gradient(world, value):
    """Whether the update after a good one changed nothing, what it returned, updates counted, the next good one."""
    replica = Replica(world)
    replica.update(0)
    before = replica.snapshot()
    _, num_tokens = replica.accumulate(1, 1)
    if world.rank == world.size - 1:
        replica.flat.grad[5] = value  # in the first rank's slice
    norm = replica.optimizer.step(lr=1e-3, num_tokens=num_tokens, max_grad_norm=UNCLIPPED)
    same = [
        torch.equal(after[name], values)
        for kept, after in zip(before, replica.snapshot(), strict=True)
        for name, values in kept.items()
    ]
    assert not replica.flat.grad.any()
    num_updates = replica.optimizer.num_updates
    return all(same), norm, num_updates, replica.update(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 3])
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(ranks, alone, size, value):
    expected = alone(torch.float32, 1, UNCLIPPED)
    for same, norm, num_updates, (loss, next_norm) in ranks.run(size, update_with_a_bad_gradient, value):
        assert same
        assert norm == math.inf
        assert num_updates == 1
        assert loss == pytest.approx(expected.losses[1], rel=1e-6)
        assert next_norm == pytest.approx(expected.norms[1], rel=1e-6)


SHAPES = [(3,), (5, 7), (1,), (200,), (9, 9, 2), (64,), (2, 300)]
"""Matrices and vectors in turn, all but one not a multiple of the alignment: shards are cut through both."""


def parameters_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return [(f"p{index}", nn.Parameter(torch.randn(shape, generator=generator))) for index, shape in enumerate(shapes)]


def decay_alone(world):
    """The parameters after an update whose gradients are zero."""
    parameters = parameters_of(SHAPES)
    flat = FlatParameters(parameters, dtype=torch.float32, device=CPU, num_shards=world.size)
    optimizer = Zero1AdamW(flat, world.group, AdamWConfig(weight_decay=0.5))
    norm = optimizer.step(lr=0.25, num_tokens=1, max_grad_norm=1.0)
    return norm, [param.detach() for _, param in parameters]


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_only_matrices_are_decayed(ranks, size):
    for norm, after in ranks.run(size, decay_alone):
        assert norm == 0
        for actual, (_, param) in zip(after, parameters_of(SHAPES), strict=True):
            expected = param.detach() * (1 - 0.25 * 0.5 if param.dim() > 1 else 1)
            assert torch.equal(actual, expected)


def train_on_from_a_copied_state(world, dtype):
    """(after the copy, after one more update) of the replica that was copied and of the copy."""
    source, copy = Replica(world, dtype=dtype), Replica(world, dtype=dtype, seed=1)
    for step in range(2):
        source.update(step)
    held = copy.optimizer.state()
    for kind, values in held.items():
        values.copy_(source.optimizer.state()[kind])
    copy.optimizer.num_updates = source.optimizer.num_updates
    copy.optimizer.publish_master(held["weight"])
    copied = [replica.snapshot() for replica in (source, copy)]
    for replica in (source, copy):
        replica.update(2)
    return copied, [replica.snapshot() for replica in (source, copy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
def test_a_published_state_continues_training_to_the_same_bits(ranks, size, dtype):
    for pairs in ranks.run(size, train_on_from_a_copied_state, dtype):
        for source, copy in pairs:
            for expected, actual in zip(source, copy, strict=True):
                for name, values in expected.items():
                    assert torch.equal(actual[name], values), name
