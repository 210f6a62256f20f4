"""RoPE stretched to a long context: published frequencies, the transpose of a scaled rotation, settings old and new."""

import math

import pytest
import torch
from tiny_models import make_model, tiny_config

from megacoder.core.config import from_dict, load_toml, parse_args, to_dict, to_toml
from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.ops.rope import apply_rope, apply_rope_, gather_unrotate, rope_frequencies, rope_tables
from megacoder.ops.rope_scaling import RopeScaling


def llama3(original, **settings):
    return RopeScaling(kind="llama3", original_max_position_embeddings=original, **settings)


def yarn(original, **settings):
    return RopeScaling(kind="yarn", original_max_position_embeddings=original, **settings)


def llama3_by_wavelength(theta, dim, factor, original, low, high):
    """As Meta describes Llama 3.1: by how a wavelength compares with those that turn `low` and `high` times."""
    scaled = []
    for pair in range(dim // 2):
        frequency = 1 / theta ** (2 * pair / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def yarn_by_index(theta, dim, factor, original, slow, fast, whole=True):
    """As arXiv:2309.00071 is published in code: between the indices whose pairs turn `fast` and `slow` times."""

    def index_of(turns):  # original * theta^(-2 index / dim) = 2 pi turns, solved for the index
        return dim / 2 * (math.log(original) - math.log(2 * math.pi * turns)) / math.log(theta)

    first, last = index_of(fast), index_of(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    scaled = []
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        divided = min(max((pair - first) / (last - first), 0), 1)
        scaled.append(divided * frequency / factor + (1 - divided) * frequency)
    return scaled


@pytest.mark.parametrize(
    ("shape", "scaling", "published"),
    [
        ((5e5, 128, 8.0), llama3(8192), llama3_by_wavelength(5e5, 128, 8, 8192, 1, 4)),  # Llama 3.1
        ((5e5, 64, 32.0), llama3(8192), llama3_by_wavelength(5e5, 64, 32, 8192, 1, 4)),  # Llama 3.2
        ((1e4, 64, 8.0), llama3(512, low_freq_factor=2.0, high_freq_factor=5.5),
         llama3_by_wavelength(1e4, 64, 8, 512, 2, 5.5)),
        ((1e6, 128, 4.0), yarn(32768), yarn_by_index(1e6, 128, 4, 32768, 1, 32)),  # Qwen2.5-Coder
        ((1e4, 64, 40.0), yarn(4096), yarn_by_index(1e4, 64, 40, 4096, 1, 32)),  # DeepSeek-Coder-V2
        ((1e4, 64, 40.0), yarn(4096, truncate=False, beta_fast=16.0, beta_slow=2.0),
         yarn_by_index(1e4, 64, 40, 4096, 2, 16, whole=False)),
    ],
)  # fmt: skip
def test_frequencies_are_the_published_ones(shape, scaling, published):
    theta, dim, factor = shape
    scaled = rope_frequencies(dim, theta=theta, factor=factor, scaling=scaling)
    assert scaled.dtype == torch.float64
    assert scaled.tolist() == pytest.approx(published, rel=1e-14)
    plain = rope_frequencies(dim, theta=theta)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / factor
    cos, sin = rope_tables(20_000, dim, theta=theta, factor=factor, scaling=scaling)
    for pair in (0, dim // 4, dim // 2 - 1):
        magnitude = 0.1 * math.log(factor) + 1 if scaling.kind == "yarn" else 1.0
        assert cos[19_999, pair].item() == pytest.approx(magnitude * math.cos(19_999 * published[pair]), abs=2e-7)
        assert sin[19_999, pair].item() == pytest.approx(magnitude * math.sin(19_999 * published[pair]), abs=2e-7)


def test_the_attention_factor_may_be_given():
    cos, sin = rope_tables(9, 8, theta=1e4, factor=4.0, scaling=yarn(64, attention_factor=1.5))
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((9, 4), 2.25))
    assert torch.equal(cos[0], torch.full((4,), 1.5))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_of_a_scaled_rotation_is_its_transpose(dtype):
    """Which is not its inverse: both multiply by the magnitude."""
    batch, length, heads, kv_heads, dim = 2, 5, 4, 2, 6
    tables = rope_tables(50, dim, theta=1e4, factor=4.0, scaling=yarn(16, attention_factor=1.7))
    wide_tables = [table.double() for table in tables]
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(batch * length, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype) for _ in "xg")
    positions = torch.randint(50, (batch * length,), generator=generator)
    rotated = heads + kv_heads

    def reference(rows):
        qk = apply_rope(rows[:, : rotated * dim].unflatten(1, (rotated, dim)), *wide_tables, positions)
        return torch.cat((qk.flatten(1), rows[:, rotated * dim :]), dim=1)

    wide = x.double().requires_grad_()
    torch.autograd.gradcheck(reference, wide)  # finite differences in fp64
    expected = reference(wide)
    expected.backward(grad.double())
    forward, backward = x.clone(), grad.clone()
    apply_rope_(forward, *tables, positions, num_rotated=rotated, head_dim=dim)
    apply_rope_(backward, *tables, positions, num_rotated=rotated, head_dim=dim, inverse=True)
    parts = grad.view(batch, length, -1, dim).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    gathered = gather_unrotate(*parts, *tables, positions)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    for ours, exact in ((forward, expected.detach()), (backward, wide.grad), (gathered, wide.grad)):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("scaling", [llama3(8), yarn(8, attention_factor=1.6)], ids=lambda scaling: scaling.kind)
def test_gradients_of_a_model_are_finite_differences_of_its_loss(scaling):
    config = tiny_config(head_dim=8, rope_factor=4.0, rope_scaling=scaling, num_key_value_heads=2)
    model = make_model(config).double()
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]
    model.loss(*batch).backward()
    for name, param in model.named_parameters():
        norm, before, losses = param.grad.norm(), param.detach().clone(), []
        for step in (-1e-5, 1e-5):
            with torch.no_grad():
                param.copy_(before + step / norm * param.grad)
                losses.append(model.loss(*batch).item())
                param.copy_(before)
        assert (losses[1] - losses[0]) / 2e-5 == pytest.approx(norm.item(), rel=1e-6), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "yarn"}, "kind = 'yarn': needs original_max_position_embeddings"),
        ({"kind": "llama3"}, "kind = 'llama3': needs original_max_position_embeddings"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings = 64: not read where kind = 'lin"),
        ({"kind": "yarn", "original_max_position_embeddings": 0}, "original_max_position_embeddings = 0: must be at"),
        ({"kind": "yarn", "original_max_position_embeddings": 8, "low_freq_factor": 2.0}, "low_freq_factor = 2.0: not"),
        ({"kind": "llama3", "original_max_position_embeddings": 8, "truncate": False}, "truncate = False: not read"),
        ({"kind": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
         "low_freq_factor = 4.0 and high_freq_factor = 4.0: both must be positive and finite, the second larger"),
        ({"kind": "yarn", "original_max_position_embeddings": 8, "beta_slow": 33.0}, "beta_slow = 33.0 and beta_fast"),
        ({"kind": "yarn", "original_max_position_embeddings": 8, "beta_fast": math.inf}, "beta_fast = inf"),
        ({"kind": "yarn", "original_max_position_embeddings": 8, "attention_factor": 0.0}, "attention_factor = 0.0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        RopeScaling(**settings)
    assert str(caught.value).startswith("model.rope_scaling.")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_factor": 0.5, "rope_scaling": llama3(64)}, "model.rope_factor = 0.5: below 1, with rope_scaling.kind"),
        ({"rope_theta": 1.0, "rope_scaling": yarn(64)}, "model.rope_theta = 1.0: not above 1"),
        ({"rope_scaling": yarn(4, truncate=False)}, "original_max_position_embeddings = 4: no frequency turns between"),
    ],
)
def test_models_that_cannot_be_scaled_so_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        tiny_config(**changes)
    assert message in str(caught.value)


def test_settings_from_before_the_kinds_are_read_as_linear():
    old = {"rope_theta": 1e5, "rope_factor": 4.0}
    config = from_dict(ModelConfig, old, where="run.toml")
    assert config.rope_scaling == RopeScaling(kind="linear")
    assert config == ModelConfig(**old)
    expected = [1e5 ** (-2 * pair / 8) / 4 for pair in range(4)]
    assert rope_frequencies(8, theta=1e5, factor=4.0).tolist() == pytest.approx(expected, rel=1e-15)


def test_settings_are_written_and_read_again_and_set_by_option(tmp_path):
    config = ModelConfig(rope_factor=4.0, rope_scaling=yarn(4096, attention_factor=1.2, truncate=False))
    assert from_dict(ModelConfig, to_dict(config), where="manifest.json") == config
    (tmp_path / "model.toml").write_text(to_toml(config))
    assert load_toml(ModelConfig, tmp_path / "model.toml") == config
    words = ["--rope-factor", "8", "--rope-scaling.kind", "llama3"]
    words += ["--rope-scaling.original-max-position-embeddings", "8192"]
    assert parse_args(ModelConfig, words, prog="x") == ModelConfig(rope_factor=8.0, rope_scaling=llama3(8192))
    with pytest.raises(ConfigError, match="needs original_max_position_embeddings"):
        parse_args(ModelConfig, ["--rope-scaling.kind", "yarn"], prog="x")


def test_rope_is_told_in_words():
    assert ModelConfig().rope_words == "RoPE of base 10,000"
    assert ModelConfig(rope_factor=4.0).rope_words == "RoPE of base 10,000, linear scaling by 4"
    stretched = ModelConfig(rope_theta=1e6, rope_factor=2.5, rope_scaling=yarn(4096), max_position_embeddings=8192)
    assert stretched.rope_words == "RoPE of base 1,000,000, yarn scaling by 2.5 from 4,096 positions"
    advice = "; its RoPE is scaled to 10,240, to which max_position_embeddings can be set"
    assert stretched.positions_advice == advice
    assert ModelConfig(rope_factor=4.0).positions_advice == ""
