"""Every example is a run that would start: it parses, its numbers fit together, its shape is what its name says."""

from pathlib import Path

import pytest

from megacoder.core.config import load_toml
from megacoder.train.config import RunConfig

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    config = load_toml(RunConfig, path)
    assert config.layout(1).schedule.num_microbatches == 2 * config.layout(2).schedule.num_microbatches
    assert path.stem.endswith(f"_{config.model.num_params / 1e6:.0f}m")


def test_there_are_examples():
    assert EXAMPLES
