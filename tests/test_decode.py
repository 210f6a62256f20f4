"""A decoding step against the model's forward in fp64: grouped heads, padding, odd sizes, both backends."""

import pytest
import tiny_models
import torch

from megacoder.model.config import ModelConfig
from megacoder.model.decode import Decoder
from megacoder.model.kv_cache import KVCache
from megacoder.model.transformer import Transformer
from megacoder.ops.rope_scaling import RopeScaling

pytestmark = pytest.mark.usefixtures("backend")

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
YARN = RopeScaling(kind="yarn", original_max_position_embeddings=8)
SHAPES = {
    "all heads": {},
    "grouped queries, yarn": {"num_key_value_heads": 2, "rope_factor": 4.0, "rope_scaling": YARN},
    "biases": {"num_key_value_heads": 2, "qkv_bias": True},
    "normed heads": {"num_key_value_heads": 2, "qk_norm": True, "rms_norm_eps": 1e-2},
    "one kv head, odd sizes": {
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "hidden_size": 37, "intermediate_size": 51,
    },
}  # fmt: skip


def make_model(**changes) -> Transformer:
    sizes = {
        "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 40, "init_std": 0.1,
    }  # fmt: skip
    return tiny_models.make_model(ModelConfig(**(sizes | changes)), seed=1)


def make_cache(model: Transformer, lengths: list[int]) -> KVCache:
    """Of so many tokens a sequence, with random keys and values, and NaN where nothing may be read."""
    width = max(lengths)
    cache = KVCache(model.config, lengths, capacity=width + 4, like=model.lm_head.weight, tp=model.tp)
    cache.advance(width)
    generator = torch.Generator().manual_seed(5)
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            kept.copy_(torch.randn(kept.shape, generator=generator))
            kept[:, :, width:] = float("nan")
    return cache


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[9], [4, 9, 1], [7] * 8, [3, 12] * 9], ids=["1", "3", "8", "18"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_steps_after_a_prompt_give_the_hidden_states_of_one_pass(changes, lengths, dtype):
    model = make_model(**changes).to(dtype)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(61, (length + 3,), generator=generator) for length in lengths]
    width = max(lengths)
    prompts = torch.stack([torch.cat((torch.zeros(width - len(s) + 3, dtype=torch.long), s[:-3])) for s in sequences])
    cache = KVCache(model.config, lengths, capacity=width + 3, like=model.lm_head.weight, tp=model.tp)
    model(prompts, cache=cache)
    decoder = Decoder(model, cache)
    steps = [decoder.step(torch.stack([sequence[at] for sequence in sequences])) for at in (-3, -2, -1)]
    exact = make_model(**changes).to(dtype).double()
    for row, sequence in enumerate(sequences):
        expected = exact(sequence[None])[0, -3:]
        actual = torch.stack([step[row] for step in steps]).double()
        assert ((actual - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sequence_does_not_depend_on_the_rest_of_the_batch(backend, dtype):
    if backend == "torch":
        pytest.skip("BLAS sums in another order for another number of rows")
    model, lengths = make_model(num_key_value_heads=2).to(dtype), [5, 11, 2, 11, 8, 1, 3]
    tokens, together = torch.arange(len(lengths)), make_cache(model, lengths)
    hidden_BD = Decoder(model, together).step(tokens)
    assert torch.isfinite(hidden_BD).all()
    for rows in ([0, 3, 6], [1], [2, 4]):
        alone = make_cache(model, lengths)
        alone.keep(torch.tensor(rows))
        assert torch.equal(Decoder(model, alone).step(tokens[rows]), hidden_BD[rows])


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steps_do_not_depend_on_the_number_of_threads(backend, dtype):
    """A model large enough for more than one: each waits for what the others compute, and for nothing else."""
    if backend == "torch":
        pytest.skip("BLAS sums in another order for another number of threads")
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 12, "num_key_value_heads": 6}
    model, threads, steps = make_model(**sizes).to(dtype), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        decoder = Decoder(model, make_cache(model, [3, 9, 30]))
        steps.append([decoder.step(torch.arange(3) + at) for at in range(4)])
    torch.set_num_threads(threads)
    for alone, two, three in zip(*steps, strict=True):
        assert torch.isfinite(alone).all()
        assert torch.equal(alone, two)
        assert torch.equal(alone, three)


@torch.no_grad()
def test_many_values_are_summed_in_fp32():
    """In bf16, a sum of a thousand parts stops growing before it is half of what it should be."""
    steps = []
    for dtype in (torch.bfloat16, torch.float64):
        model = make_model(max_position_embeddings=1100).to(torch.bfloat16).to(dtype)
        cache = make_cache(model, [1000])
        for layer in cache.layers:
            layer.keys.zero_()
            layer.values.fill_(1.0)
        steps.append(Decoder(model, cache).step(torch.tensor([1])).double())
    assert (steps[0] - steps[1]).norm() <= TOLERANCE[torch.bfloat16] * steps[1].norm()


@torch.no_grad()
def test_a_step_beyond_the_cache_is_refused(backend):
    if backend == "torch":
        pytest.skip("torch refuses by itself")
    model = make_model()
    decoder = Decoder(model, make_cache(model, [6]))
    for _ in range(4):
        decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="column 10: must be from 0 to 9"):
        decoder.step(torch.tensor([1]))
