"""FLOPs per token against the figures of a 1.3B model worked out by hand (2 FLOPs per weight, three GEMMs per step)."""

import pytest

from megacoder.model.config import ModelConfig


def test_flops_of_the_default_shape_at_4096():
    config = ModelConfig()
    full, causal = (config.attention_flops_per_token(4096, causal=causal) for causal in (False, True))
    # scores and values: 2 products of 2 x 2,048 FLOPs for each of 4,096 keys, three times over, in 24 layers
    assert full == 2 * 2 * 2048 * 4096 * 3 * 24
    assert causal == full / 2
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5504
    assert config.num_matmul_params == 24 * layer + 32256 * 2048
    assert config.training_flops_per_token(4096, causal=False) == pytest.approx(10.10e9, rel=1e-3)
    assert config.training_flops_per_token(4096, causal=True) == pytest.approx(8.89e9, rel=1e-3)
