"""The ablation runner: five runs that differ in one table, measured and drawn."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
from evaluation_samples import source_files, write_shard
from train_cases import make_case

from megacoder.core.config import to_dict
from megacoder.core.errors import ConfigError
from megacoder.evaluate import infill
from megacoder.train.loop import train

SCRIPT = Path(__file__).parent.parent / "examples" / "fim_ablation" / "run.py"


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("fim_ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants_differ_only_in_fill_in_the_middle(ablation, tmp_path):
    base = make_case(tmp_path).config("base")
    options = ablation.Options(out=tmp_path / "out", steps=8)
    configs = {name: to_dict(ablation.variant_config(base, name, options)) for name in ablation.VARIANTS}
    objectives = {}
    for name, config in configs.items():
        fim = config["data"]["stream"].pop("fim")
        objectives[name] = (fim["rate"], fim["spm_rate"], fim["msp_rate"])
    assert objectives == {
        "0%": (0.0, 0.0, 0.0), "50% PSM": (0.5, 0.0, 0.0), "100% PSM": (1.0, 0.0, 0.0), "50% SPM": (0.5, 1.0, 0.0),
        "50% MSP": (0.5, 0.0, 1.0),
    }  # fmt: skip
    for config in configs.values():
        del config["output"]
    assert len({json.dumps(config, sort_keys=True) for config in configs.values()}) == 1


def test_two_variants_are_trained_measured_and_drawn(ablation, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # one thread
    case = make_case(tmp_path)
    base = case.config("base", eval_batches=1)
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, max_position_embeddings=128))
    held_out = tmp_path / "heldout.parquet"
    write_shard(held_out, source_files())
    options = ablation.Options(
        out=tmp_path / "out", steps=4, points=2, num_tasks=3, held_out=held_out, variants=("0%", "50% SPM")
    )
    results, asked = {}, []

    def fill_lines(*args, spm, **options):
        asked.append(spm)
        return infill.fill_lines(*args, spm=spm, **options)

    monkeypatch.setattr(ablation, "fill_lines", fill_lines)
    for name in options.variants:
        config = ablation.variant_config(base, name, options)
        train(config)
        results[name] = ablation.measure(config, options)
    for row in results.values():
        assert [step for step, *_ in row["infill"]] == [2, 4]
        assert [step for step, _ in row["loss"]][-1] == 4
        assert all(math.isfinite(loss) for _, loss in row["loss"])
    assert asked == [False, False, True, True]
    assert results["0%"]["loss"] != results["50% SPM"]["loss"]
    page = ablation.report(results, options)
    assert page.count("<polyline") == 4
    assert "50% SPM" in page


def test_an_unknown_variant_is_refused(ablation):
    with pytest.raises(ConfigError, match=r"--variants '30%': expected some of '0%'"):
        ablation.Options(variants=("30%",))
