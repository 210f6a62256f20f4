"""Every example could start: it parses, its numbers are consistent, its shape and figures are the published ones."""

from pathlib import Path

import pytest

from megacoder.core.config import load_toml
from megacoder.model.config import ModelConfig
from megacoder.model.presets import PRESETS
from megacoder.train.config import RunConfig
from megacoder.train.sft import DEFAULTS, prepared_run

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.toml"))
RANKS = {"1.3b": 8, "1.5b": 8, "5.7b": 64, "6.7b": 64, "33b": 512, "7b": 64}
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
ROPE = ("rope_theta", "rope_factor", "max_position_embeddings")


MIX = [("code", 0.87, 0.5), ("english", 0.10, 0.0), ("chinese", 0.03, 0.0)]
"""Dataset, share of the tokens, rate of fill-in-the-middle (arXiv:2401.14196, sections 2 and 3.1)."""


def load(name):
    path = FOLDER / f"{name}.toml"
    return load_toml(RunConfig, path, absent=DEFAULTS if name.startswith("instruct") else None)


def test_every_recipe_is_there():
    assert len(EXAMPLES) == 14  # without files the tests below would be none


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_example(name):
    config = load(name)
    size = name.rpartition("_")[2]
    assert config.checkpoint_minutes in (5, 10)
    assert config.checkpoint.keep_every == config.checkpoint_every, "a curve of the run"
    if name.startswith("long_context"):
        assert config.data.stream.seed != load(f"pretrain_{size}").data.stream.seed, "it begins with other documents"
    if name == "pretrain_13m":
        assert size == f"{config.model.num_params / 1e6:.0f}m"
        assert config.layout(1).schedule.num_microbatches == 2 * config.layout(2).schedule.num_microbatches
        return
    preset = PRESETS[{"7b": "v1.5-7b", "1.5b": "qwen2.5-1.5b"}.get(size, size)]
    assert [getattr(config.model, key) for key in SHAPE] == [getattr(preset.model, key) for key in SHAPE]
    assert config.model.padded_vocab_size == preset.model.vocab_size
    assert config.layout(RANKS[size]).dims.world_size == RANKS[size]
    assert config.output == Path("runs") / name
    if size == "33b":
        assert config.layout(1024).dims.world_size == 1024


@pytest.mark.parametrize("size", ["1.3b", "5.7b", "6.7b", "33b"])
def test_rope_is_the_published_one(size):
    before, after = load(f"pretrain_{size}").model, load(f"long_context_{size}").model
    assert [getattr(before, key) for key in ROPE] == [getattr(ModelConfig(), key) for key in ROPE] == [1e4, 1.0, 4096]
    assert [getattr(after, key) for key in ROPE] == [getattr(PRESETS[size].model, key) for key in ROPE]
    assert [getattr(after, key) for key in ROPE] == [1e5, 4.0, 16_384]


def test_the_extension_of_5_7b_follows_its_pretraining():
    before, after = load("pretrain_5.7b"), load("long_context_5.7b")
    assert (after.init_from, after.init_optimizer, after.schedule.warmup_steps) == (before.output, True, 0)
    assert after.learning_rate(1) == after.learning_rate(1000) == pytest.approx(0.1 * before.schedule.peak_lr)


@pytest.mark.parametrize("size", ["1.3b", "6.7b", "33b"])
def test_recipes_have_the_published_figures_and_follow_each_other(size):
    first, second, third = (load(f"{recipe}_{size}") for recipe in ("pretrain", "long_context", "instruct"))
    preset = PRESETS[size]
    assert (first.global_batch_size, first.schedule.peak_lr) == (preset.global_batch_size, preset.peak_lr)
    assert first.steps * first.global_batch_size * 4096 == pytest.approx(2e12, rel=1e-5)
    assert (first.schedule.kind, first.schedule.warmup_steps) == ("three_stage", 2000)
    assert _mix(first) == _mix(second) == MIX
    assert (second.init_from, second.init_optimizer, second.schedule.warmup_steps) == (first.output, True, 0)
    assert (second.steps, second.global_batch_size, second.data.stream.seq_length) == (1000, 512, 16_384)
    assert second.learning_rate(1) == second.learning_rate(1000) == pytest.approx(0.1 * preset.peak_lr)
    assert (third.init_from, third.init_optimizer) == (second.output, False)
    assert third.model == second.model
    assert third.schedule.peak_lr == 1e-5
    assert third.steps * third.global_batch_size * 16_384 == pytest.approx(2e9, rel=0.05)
    assert prepared_run(third).data.tokenizer == third.output / "tokenizer"


def _mix(config):
    data = config.data
    return [(path.name, *rest) for path, *rest in zip(data.train, data.weights, data.fim_rates, strict=True)]


def test_the_5_7b_recipe_reads_the_same_mix():
    assert _mix(load("pretrain_5.7b")) == MIX


def test_continued_pretraining_mixes_as_published():
    config = load("continue_v1.5_7b")
    assert config.data.weights == (70.0, 10.0, 7.0, 7.0, 6.0)
    assert config.data.stream.fim.rate == 0.0
    assert config.model == PRESETS["v1.5-7b"].model


def test_a_qwen_is_continued_as_it_was():
    config = load("continue_qwen2.5_coder_1.5b")
    assert config.model == PRESETS["qwen2.5-1.5b"].model
    assert config.data.tokenizer == config.init_from / "tokenizer"
    assert config.steps * config.global_batch_size * config.data.stream.seq_length == pytest.approx(2e9, rel=0.05)
    assert config.data.stream.document_masks


def test_launch_scripts_name_recipes_that_are_there():
    scripts = list((FOLDER / "launch").glob("*.sh"))
    named = {word for script in scripts for word in script.read_text().split() if word.endswith(".toml")}
    assert {word for word in named if word.startswith("examples/")} >= {"examples/pretrain_33b.toml"}
    assert all((FOLDER.parent / word).exists() for word in named if word.startswith("examples/"))
