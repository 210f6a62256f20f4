"""Greedy generation equals transformers' token for token; cache, padding and the rest of the batch change nothing."""

import dataclasses

import pytest
import tiny_models
import torch

from megacoder.core.errors import DataError
from megacoder.evaluate.generate import generate
from megacoder.evaluate.sampling import Sampling
from megacoder.model import kv_cache
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import export_model
from megacoder.model.kv_cache import KVCache
from megacoder.model.presets import find_preset
from megacoder.model.transformer import Transformer
from megacoder.ops.rope_scaling import RopeScaling
from megacoder.parallel.tensor import ALONE, TensorParallel

YARN = RopeScaling(kind="yarn", original_max_position_embeddings=64)
SHAPES = {
    "all heads": {"num_key_value_heads": 4},
    "grouped queries, linear rope": {"num_key_value_heads": 2, "rope_factor": 4.0},
    "grouped queries, yarn": {"num_key_value_heads": 2, "rope_factor": 4.0, "rope_scaling": YARN},
    "biases": {"num_key_value_heads": 2, "qkv_bias": True},
    "normed heads": {"num_key_value_heads": 2, "head_dim": 8, "qk_norm": True},
    "one kv head, odd vocabulary": {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 131},
}


def make_model(**changes) -> Transformer:
    sizes = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 96, "init_std": 0.15,
    }  # fmt: skip
    return tiny_models.make_model(ModelConfig(**(sizes | changes)), seed=3)


def make_prompts(lengths, vocab=101, seed=7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def make_long_case(changes) -> tuple[Transformer, list[list[int]]]:
    """A model and prompts whose next 200 tokens never repeat for long, nor hang on the last bit of a logit.

    The two likeliest tokens are 3e-4 standard deviations of the logits apart or more; orders of summation change 1e-5.
    """
    model = make_model(**changes, max_position_embeddings=256, init_std=0.3)
    return model, make_prompts([3, 17, 9, 1, 17], seed=9)


@torch.no_grad()
def without_cache(model, prompt, new) -> list[int]:
    """The likeliest token after `prompt` and each part of `new`: greedy decoding repeats `new` if and only if it is."""
    logits = model.logits(model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1])
    return logits.argmax(-1).tolist()


def by_transformers(folder, prompts, count) -> list[list[int]]:
    """Greedy, in one batch padded on the left."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = theirs.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return made[:, width:].tolist()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_200_greedy_tokens_are_those_of_transformers_with_and_without_cache(tmp_path, changes):
    model, prompts = make_long_case(changes)
    export_model(model, tmp_path / "hf")
    expected = by_transformers(tmp_path / "hf", prompts, 200)
    assert min(len(set(tokens)) for tokens in expected) > 40
    assert generate(model, prompts, max_new_tokens=200) == expected
    assert generate(model, prompts, max_new_tokens=200, batch_size=2) == expected
    assert [without_cache(model, *case) for case in zip(prompts, expected, strict=True)] == expected


def test_a_cache_filled_in_pieces_gives_the_hidden_states_of_one_pass():
    model, tokens = make_model(), torch.tensor(make_prompts([20, 20]))
    cache = KVCache(model.config, [20, 20], capacity=24, like=model.norm.weight, tp=model.tp)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([7, 1, 12], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))


def test_padding_has_positions_and_sees_itself():
    """Kernels look up the angles of each position, and a softmax over nothing would be NaN."""
    model = make_model()
    cache = KVCache(model.config, [1, 4], capacity=6, like=model.norm.weight, tp=model.tp)
    assert cache.advance(4).tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert cache.mask[:, 0].diagonal(dim1=1, dim2=2).all()
    assert cache.advance(1).tolist() == [[1], [4]]


@pytest.mark.parametrize("columns", [1, 2, 5, 16])
def test_padded_prompts_are_read_in_passes_whose_mask_is_small(monkeypatch, columns):
    model, prompts = make_long_case({})
    expected = generate(model, prompts, max_new_tokens=40)
    most, sizes = columns * len(prompts) * (17 + 40), []
    advance = KVCache.advance

    def measured(cache, count):
        positions = advance(cache, count)
        sizes.append((count, cache.mask.numel()))
        return positions

    monkeypatch.setattr(kv_cache, "_MASK_ELEMENTS", most)
    monkeypatch.setattr(KVCache, "advance", measured)
    assert generate(model, prompts, max_new_tokens=40) == expected
    width = max(columns, 2)
    assert [count for count, _ in sizes[: 17 // width + 1]] == [width] * (17 // width) + [17 % width]
    assert columns == 1 or max(size for _, size in sizes) <= most


def test_generation_stops_before_a_stop_id_while_others_continue(backend):
    model, prompts = make_model(), make_prompts([4, 11, 6, 9, 2, 13])
    full = generate(model, prompts, max_new_tokens=30)
    stops = {tokens[place * 5] for place, tokens in enumerate(full[:4])}
    expected = []
    for tokens in full:
        ends = [index for index, token in enumerate(tokens) if token in stops]
        expected.append(tokens[: ends[0]] if ends else tokens)
    assert len({len(tokens) for tokens in expected}) > 2  # the batch shrinks on the way
    assert generate(model, prompts, max_new_tokens=30, stop_ids=stops) == expected


def test_samples_are_a_function_of_seed_and_place():
    model, prompts = make_model(), make_prompts([4, 9, 4])
    sampling = Sampling(temperature=1.0, seed=5)
    drawn = generate(model, prompts, max_new_tokens=20, sampling=sampling)
    assert drawn == generate(model, prompts, max_new_tokens=20, sampling=sampling, batch_size=1)
    assert drawn[0] != generate(model, prompts, max_new_tokens=20, sampling=Sampling(temperature=1.0, seed=6))[0]
    same_prompt = generate(model, [prompts[0]] * 2, max_new_tokens=20, sampling=sampling)
    assert same_prompt[0] == drawn[0] != same_prompt[1]
    greedy = generate(model, prompts, max_new_tokens=20)
    assert generate(model, prompts, max_new_tokens=20, sampling=Sampling(temperature=1.0, top_p=1e-6)) == greedy
    assert generate(model, prompts, max_new_tokens=20, sampling=Sampling(temperature=1e-4)) == greedy


def sample_on_ranks(world, seeds):
    """Each rank with a seed of its own, as if it rounded otherwise; ends by stop ids, which ranks must see at once."""
    tp = TensorParallel(rank=world.rank, size=world.size, group=world.group)
    model = tiny_models.make_model(make_model(vocab_size=96).config, seed=3, tp=tp)
    sampling = Sampling(temperature=1.0, seed=seeds[world.rank])
    prompts = make_prompts([4, 9, 4], vocab=96)
    return generate(model, prompts, max_new_tokens=20, stop_ids=range(12), sampling=sampling)


def test_ranks_that_share_a_model_take_the_tokens_that_the_first_one_draws(ranks):
    expected, _ = ranks.run(2, sample_on_ranks, (5, 5))
    assert len({len(tokens) for tokens in expected}) > 1
    assert ranks.run(2, sample_on_ranks, (5, 6)) == [expected, expected]


def test_passes_over_padded_prompts_hold_few_scores_on_a_gpu():
    config = dataclasses.replace(find_preset("33b").model, num_hidden_layers=1)
    like = torch.empty(0, device="meta")  # stands for a GPU
    cache = KVCache(config, [15_000, *[16_000] * 15], capacity=16_384, like=like, tp=ALONE)
    assert cache.longest_pass == 2**28 // (56 * 16 * 16_384)
    assert KVCache(config, [16_000] * 16, capacity=16_384, like=like, tp=ALONE).longest_pass == 16_384


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_follow_the_models_probabilities(top_p):
    model, prompt = make_model(vocab_size=8, init_std=0.05), [1, 2, 3]
    with torch.no_grad():
        probabilities = model.logits(model(torch.tensor([prompt]))[0, -1]).softmax(-1)
    if top_p < 1:
        likeliest = probabilities.sort(descending=True)
        kept = int((likeliest.values.cumsum(-1) < top_p).sum()) + 1
        probabilities = torch.zeros(8).scatter(0, likeliest.indices[:kept], likeliest.values[:kept])
        probabilities /= probabilities.sum()
    sampling = Sampling(temperature=1.0, top_p=top_p)
    drawn = generate(model, [prompt] * 3000, max_new_tokens=1, sampling=sampling, batch_size=3000)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert counts[probabilities == 0].sum() == 0
    torch.testing.assert_close(counts / 3000, probabilities, rtol=0, atol=0.03)


def test_no_prompts_and_no_tokens():
    assert generate(make_model(), [], max_new_tokens=5) == []
    assert generate(make_model(), [[1], [2, 3]], max_new_tokens=0) == [[], []]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty"),
        ([5, 101], "prompt 1 holds token 101, but the model knows 101 tokens"),
        ([-1], "holds token -1"),
        ([1] * 90, "prompt 1 has 90 tokens; with 7 new ones it does not fit into the model's 96 positions"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt, message):
    with pytest.raises(DataError, match=message):
        generate(make_model(), [[1], prompt], max_new_tokens=7)
    assert len(generate(make_model(), [[1] * 89], max_new_tokens=7)[0]) == 7
