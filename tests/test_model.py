"""The plain model against transformers' Llama, and the hand-scheduled step against the plain model."""

import functools

import pytest
import torch
from tiny_models import make_model, named_grads, peer_of, tiny_config

from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.stage import Stage, forward_backward, forward_loss
from megacoder.model.transformer import weight_pieces
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.ops.rope_scaling import RopeScaling
from megacoder.parallel.flat import FlatParameters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

LLAMA3 = RopeScaling(kind="llama3", original_max_position_embeddings=8)
YARN = RopeScaling(kind="yarn", original_max_position_embeddings=8)
SHAPES = {
    "all heads": {},
    "grouped": {"num_key_value_heads": 2},
    "one kv head, scaled rope": {"num_key_value_heads": 1, "rope_factor": 4.0, "rope_theta": 1e5},
    "llama3 rope": {"rope_factor": 4.0, "rope_scaling": LLAMA3},
    "yarn": {"num_key_value_heads": 2, "rope_factor": 4.0, "rope_scaling": YARN},
    "free head_dim, tied": {"head_dim": 10, "tie_word_embeddings": True},
    "biases, grouped": {"qkv_bias": True, "num_key_value_heads": 2},
    "biases, tied": {"qkv_bias": True, "tie_word_embeddings": True},
    "normed heads, grouped": {"qk_norm": True, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-2},
    "normed heads, yarn": {"qk_norm": True, "rope_factor": 4.0, "rope_scaling": YARN},
    "normed heads, tied": {"qk_norm": True, "tie_word_embeddings": True},
}


tiny = functools.partial(
    tiny_config, vocab_size=101, num_hidden_layers=3, head_dim=8, max_position_embeddings=64, init_std=0.05
)


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
    plain = make_model(config).double()
    plain.loss(tokens, labels).backward()
    expected = {name: param.grad for name, param in plain.named_parameters()}

    model = make_model(config)
    FlatParameters(model.named_parameters(), dtype=torch.float32, device=DEVICE)
    batch = tokens.to(DEVICE), labels.to(DEVICE)
    for loss in (forward_loss(model, *batch), forward_backward(model, *batch)):
        assert loss.num_tokens == 55
        assert loss.total.item() == pytest.approx(plain.loss(tokens, labels).item(), rel=1e-6)
    for name, param in model.named_parameters():
        assert (param.grad.cpu().double() - expected[name]).norm() <= 1e-5 * expected[name].norm(), name

    forward_backward(model, *batch)  # gradients accumulate
    for name, param in model.named_parameters():
        assert (param.grad.cpu().double() - 2 * expected[name]).norm() <= 2e-5 * expected[name].norm(), name


@pytest.mark.parametrize(("lacking", "left"), [("q_norm", "k_norm"), ("k_norm", "q_norm")])
def test_a_layer_that_norms_only_queries_or_only_keys_is_not_run_by_hand(lacking, left):
    model = make_model(tiny(qk_norm=True))
    setattr(model.decoder_layers()[1].self_attn, lacking, None)
    with pytest.raises(ConfigError, match=rf"does not know, or lack some: self_attn\.{left}\.weight; set"):
        Stage.whole(model)


@pytest.mark.usefixtures("backend")
def test_bf16_step_errs_at_most_twice_as_much_as_autograd_in_bf16():
    config = tiny(num_key_value_heads=2)
    tokens, labels = batch_of(config)
    exact = make_model(config).double()
    exact.loss(tokens, labels).backward()
    rounded = make_model(config).bfloat16()
    rounded.loss(tokens, labels).backward()

    model = make_model(config)
    FlatParameters(model.named_parameters(), dtype=torch.bfloat16, device=DEVICE)
    forward_backward(model, tokens.to(DEVICE), labels.to(DEVICE))

    def error(other):
        pairs = zip(other.parameters(), exact.parameters(), strict=True)
        return sum((a.grad.cpu().double() - b.grad).pow(2).sum() for a, b in pairs).sqrt()

    assert error(model) <= 2 * error(rounded)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_model_equals_transformers(shape):
    config = tiny(**SHAPES[shape])
    model = make_model(config)
    peer = peer_of(model)
    tokens, labels = batch_of(config)
    with torch.no_grad():
        assert torch.allclose(model.logits(model(tokens)), peer(input_ids=tokens).logits, atol=1e-5)
    model.loss(tokens, labels).backward()
    (peer(input_ids=tokens, labels=tokens, shift_labels=labels).loss * 55).backward()
    for name, grad in named_grads(model).items():
        expected = peer.get_parameter(name).grad
        assert (grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_weights_are_a_function_of_seed_and_name():
    config = tiny()
    first, again, other = make_model(config), make_model(config), make_model(config, seed=1)
    deeper = make_model(tiny(num_hidden_layers=5))
    shared = {piece.hf_name: piece.view for piece in weight_pieces(deeper)}
    for a, b, c in zip(weight_pieces(first), weight_pieces(again), weight_pieces(other), strict=True):
        assert torch.equal(a.view, b.view)
        assert torch.equal(a.view, shared[a.hf_name])
        assert torch.equal(a.view, c.view) == (a.view.dim() == 1)
    assert not first.lm_head.weight[config.vocab_size :].any()


def test_matrices_are_drawn_with_the_models_deviation_and_norms_are_ones():
    for piece in weight_pieces(make_model(tiny_config(init_std=0.03))):
        if piece.view.dim() == 1:
            assert (piece.view == 1).all(), piece.hf_name
        else:
            assert piece.view.std().item() == pytest.approx(0.03, rel=0.1), piece.hf_name
            assert abs(piece.view.mean().item()) < 0.003, piece.hf_name


def test_published_sizes():
    """Parameter counts of DeepSeek-Coder's models (arXiv:2401.14196, Table 2, and their config files)."""
    assert ModelConfig().num_params == 1_346_471_936
    assert ModelConfig(
        hidden_size=7168, intermediate_size=19200, num_hidden_layers=62, num_attention_heads=56, num_key_value_heads=8
    ).num_params == 33_342_991_360  # fmt: skip


def test_sequences_longer_than_the_rotary_tables_are_refused():
    model = make_model(tiny(max_position_embeddings=16))
    tokens = torch.zeros(1, 17, dtype=torch.long)
    with pytest.raises(ValueError, match="sequences of 17 tokens; the model has 16 positions"):
        forward_loss(model, tokens, tokens)
