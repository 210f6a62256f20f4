"""The plain model against transformers' Llama, and the hand-scheduled step against the plain model."""

import pytest
import torch

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.init import init_weights
from megacoder.model.stage import forward_backward, forward_loss
from megacoder.model.transformer import Transformer, weight_pieces
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.parallel.flat import FlatParameters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SHAPES = {
    "all heads": {},
    "grouped": {"num_key_value_heads": 2},
    "one kv head, scaled rope": {"num_key_value_heads": 1, "rope_factor": 4.0, "rope_theta": 1e5},
    "free head_dim, tied": {"head_dim": 10, "tie_word_embeddings": True},
}


def tiny(**changes):
    shape = {
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
        "init_std": 0.05, "vocab_multiple": 64,
    }  # fmt: skip
    return ModelConfig(**{**shape, **changes})


def build(config, seed=0):
    model = Transformer(config)
    init_weights(model, seed=seed)
    return model


def batch_of(config, seed=0):
    tokens = torch.randint(0, config.vocab_size, (3, 21), generator=torch.Generator().manual_seed(seed))
    labels = tokens[:, 1:].clone()
    labels[1, 4:9] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), labels.contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("backend")
def test_hand_scheduled_step_equals_autograd(shape):
    config = tiny(**SHAPES[shape])
    tokens, labels = batch_of(config)
    plain = build(config).double()
    plain.loss(tokens, labels).backward()
    expected = {name: param.grad for name, param in plain.named_parameters()}

    model = build(config)
    FlatParameters(model.named_parameters(), dtype=torch.float32, device=DEVICE)
    batch = tokens.to(DEVICE), labels.to(DEVICE)
    loss = forward_backward(model, *batch)
    assert loss.num_tokens == 55
    assert loss.total.item() == pytest.approx(plain.loss(tokens, labels).item(), rel=1e-6)
    for name, param in model.named_parameters():
        assert (param.grad.cpu().double() - expected[name]).norm() <= 1e-5 * expected[name].norm(), name

    forward_backward(model, *batch)  # gradients accumulate
    for name, param in model.named_parameters():
        assert (param.grad.cpu().double() - 2 * expected[name]).norm() <= 2e-5 * expected[name].norm(), name


@pytest.mark.usefixtures("backend")
def test_bf16_step_errs_at_most_twice_as_much_as_autograd_in_bf16():
    config = tiny(num_key_value_heads=2)
    tokens, labels = batch_of(config)
    exact = build(config).double()
    exact.loss(tokens, labels).backward()
    rounded = build(config).bfloat16()
    rounded.loss(tokens, labels).backward()

    model = build(config)
    FlatParameters(model.named_parameters(), dtype=torch.bfloat16, device=DEVICE)
    forward_backward(model, tokens.to(DEVICE), labels.to(DEVICE))

    def error(other):
        pairs = zip(other.parameters(), exact.parameters(), strict=True)
        return sum((a.grad.cpu().double() - b.grad).pow(2).sum() for a, b in pairs).sqrt()

    assert error(model) <= 2 * error(rounded)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_model_equals_transformers(shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny(**SHAPES[shape])
    model = build(config)
    rope = {"rope_type": "linear", "factor": config.rope_factor, "rope_theta": config.rope_theta}
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters=rope, attn_implementation="eager",
        )
    )  # fmt: skip
    named = {piece.hf_name: piece.view for piece in weight_pieces(model)}
    missing, unexpected = peer.load_state_dict(named, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    tokens, labels = batch_of(config)
    with torch.no_grad():
        assert torch.allclose(model.logits(model(tokens)), peer(input_ids=tokens).logits, atol=1e-5)
    for replica in (model, peer):
        replica.zero_grad()
    model.loss(tokens, labels).backward()
    (peer(input_ids=tokens, labels=tokens, shift_labels=labels).loss * 55).backward()
    grads = dict(peer.named_parameters())
    for piece in weight_pieces(model):
        actual, expected = piece.param.grad[piece.start : piece.start + piece.rows], grads[piece.hf_name].grad
        assert (actual - expected).norm() <= 1e-4 * expected.norm(), piece.hf_name


def test_weights_are_a_function_of_seed_and_name():
    config = tiny()
    first, again, other = build(config), build(config), build(config, seed=1)
    deeper = build(tiny(num_hidden_layers=5))
    shared = {piece.hf_name: piece.view for piece in weight_pieces(deeper)}
    for a, b, c in zip(weight_pieces(first), weight_pieces(again), weight_pieces(other), strict=True):
        assert torch.equal(a.view, b.view)
        assert torch.equal(a.view, shared[a.hf_name])
        assert torch.equal(a.view, c.view) == (a.view.dim() == 1)
    assert not first.lm_head.weight[config.vocab_size :].any()


def test_published_sizes():
    """Parameter counts of DeepSeek-Coder's models (arXiv:2401.14196, Table 2, and their config files)."""
    assert ModelConfig().num_params == 1_346_471_936
    assert ModelConfig(
        hidden_size=7168, intermediate_size=19200, num_hidden_layers=62, num_attention_heads=56, num_key_value_heads=8
    ).num_params == 33_342_991_360  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"rope_factor": 0.0}, "rope_factor = 0.0"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_sequences_longer_than_the_rotary_tables_are_refused():
    model = build(tiny(max_position_embeddings=16))
    tokens = torch.zeros(1, 17, dtype=torch.long)
    with pytest.raises(ValueError, match="sequences of 17 tokens; the model has 16 positions"):
        forward_loss(model, tokens, tokens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("backend")
def test_forward_loss_equals_the_plain_model(shape):
    config = tiny(**SHAPES[shape])
    model, (tokens, labels) = build(config), batch_of(config)
    loss = forward_loss(model, tokens, labels)
    assert loss.num_tokens == 55
    assert loss.total.item() == pytest.approx(model.loss(tokens, labels).item(), rel=1e-6)
