"""What a stage keeps between forward and backward, and that recomputing the rest changes no bit."""

import pytest
import torch
from tiny_models import make_model, pipeline_config

from megacoder.core.errors import ConfigError
from megacoder.model.kept import kept_bytes_per_token
from megacoder.model.partition import ExecutionConfig
from megacoder.model.plain_stage import PlainStage
from megacoder.model.stage import Microbatch, Stage
from megacoder.parallel.flat import FlatParameters

RECOMPUTE = ("none", "selective", "full")
MODES = {Stage: (*RECOMPUTE, "norms"), PlainStage: RECOMPUTE}
D, F, H, G, K, LAYERS = 24, 40, 4, 2, 8, 3
C = (H + 2 * G) * K
BATCH, LENGTH = 2, 11
BYTES_PER_TOKEN = {  # of a layer, e bytes per element
    "none": lambda e: e * (4 * D + C + H * K + 2 * F) + 4 * H + 8,
    "norms": lambda e: e * (2 * D + C + H * K + 2 * F) + 4 * H,
    "selective": lambda e: e * (2 * D + C + H * K) + 4 * H,
    "full": lambda e: e * D,
}


def build(dtype, **changes):
    config = pipeline_config(
        LAYERS, hidden_size=D, intermediate_size=F, num_attention_heads=H, num_key_value_heads=G, head_dim=K,
        **changes,
    )  # fmt: skip
    model = make_model(config, seed=1)
    return model, FlatParameters(model.named_parameters(), dtype=dtype, device=torch.device("cpu"))


def microbatch():
    tokens = torch.randint(0, 61, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def tensors_in(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, tuple):
        for part in thing:
            yield from tensors_in(part)
    elif thing is not None:
        for name in thing.__slots__:
            yield from tensors_in(getattr(thing, name))


def num_bytes(tensors):
    """Of the memory behind them, each piece counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", MODES[Stage])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "normed heads"])
@pytest.mark.usefixtures("backend")
def test_a_layer_keeps_the_bytes_that_are_documented(recompute, qk_norm, dtype):
    model, _ = build(dtype, qk_norm=qk_norm)
    _, saved = Stage.whole(model, recompute=recompute).forward(None, microbatch())
    both = dtype.itemsize * (H + G) * K if qk_norm and recompute == "none" else 0  # as projected, and as rotated
    expected = (BYTES_PER_TOKEN[recompute](dtype.itemsize) + both) * BATCH * LENGTH
    assert [num_bytes(tensors_in(layer)) for layer in saved.layers] == [expected] * LAYERS
    together = [tensor for layer in saved.layers for tensor in tensors_in(layer)]
    assert num_bytes(together) == expected * LAYERS  # nothing twice
    assert kept_bytes_per_token(model.config, recompute, itemsize=dtype.itemsize) * BATCH * LENGTH == expected


def packed_bytes(recompute):
    """What autograd keeps of a microbatch, weights and tables of the model apart."""
    model, flat = build(torch.float32)
    rope = model.rope(torch.device("cpu"))
    own = {tensor.untyped_storage().data_ptr() for tensor in (flat.weight, rope.cos, rope.sin)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        PlainStage.whole(model, recompute=recompute).forward(None, microbatch())
    return num_bytes(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own)


def test_the_plain_stage_keeps_less_the_more_is_recomputed():
    none, selective, full = map(packed_bytes, RECOMPUTE)
    wide = LAYERS * BATCH * LENGTH * 4 * 3 * F  # gate, up, activation
    assert none - selective >= wide
    assert selective - full >= LAYERS * BATCH * LENGTH * 4 * (C + H * K)


def gradients(kind, recompute, dtype, *, postponed, **changes):
    model, flat = build(dtype, **changes)
    stage = kind.whole(model, recompute=recompute)
    for _ in range(2):  # microbatches
        loss, saved = stage.forward(None, microbatch())
        if postponed:
            nothing, weight_gradients = stage.backward_input(None, saved)
            weight_gradients()
        else:
            nothing = stage.backward(None, saved)
        assert nothing is None
    assert all(param.grad.untyped_storage().data_ptr() == flat.grad.data_ptr() for param in model.parameters())
    return loss.total, flat.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=["", "biases", "normed heads"])
@pytest.mark.parametrize("kind", [Stage, PlainStage])
@pytest.mark.usefixtures("backend")
def test_recomputing_and_postponed_weight_gradients_change_no_bit(kind, changes, dtype):
    loss, grad = gradients(kind, "none", dtype, postponed=False, **changes)
    assert grad.abs().sum() > 0
    for recompute in MODES[kind]:
        for postponed in (False, True):
            other_loss, other_grad = gradients(kind, recompute, dtype, postponed=postponed, **changes)
            assert torch.equal(other_loss, loss)
            assert torch.equal(other_grad, grad), (recompute, postponed)


@pytest.mark.parametrize(("kind", "recompute"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_chained_stages_equal_the_full_model(kind, recompute):
    """What crosses stages is (T, D) in the weights' dtype both ways, gradients as memory that can be sent."""
    loss, grad = gradients(kind, "none", torch.bfloat16, postponed=False)
    model, flat = build(torch.bfloat16)
    stages = [
        kind(model=model, layers=layers, is_first=not layers.start, is_last=layers.stop == LAYERS, recompute=recompute)
        for layers in (range(1), range(1, 2), range(2, LAYERS))
    ]
    for _ in range(2):
        x, kept = None, []
        for stage in stages:
            evaluated = stage.evaluate(x, microbatch())
            x, saved = stage.forward(x, microbatch())
            kept.append(saved)
            if stage.is_last:
                assert evaluated == x
            else:
                boundary = stage.new_boundary(microbatch())
                assert (x.shape, x.dtype, x.requires_grad) == (boundary.shape, boundary.dtype, False)
                assert torch.equal(evaluated, x)
        grad_x = None
        for stage, saved in zip(reversed(stages), reversed(kept), strict=True):
            grad_x = stage.backward(grad_x, saved)
            assert stage.is_first or (grad_x.shape, grad_x.dtype, grad_x.is_contiguous()) == (
                boundary.shape, boundary.dtype, True
            )  # fmt: skip
    assert torch.equal(x.total, loss)
    assert torch.equal(flat.grad, grad)


def test_recomputing_only_norms_needs_the_scheduled_block():
    with pytest.raises(ConfigError, match=r'execution\.recompute = "norms" needs execution\.block = "scheduled"'):
        ExecutionConfig(block="plain", recompute="norms")
