"""The kernels of lesser processors that this one can run as well: tests elsewhere see those of the fastest alone."""

import pytest
import torch
from test_corpus_minhash import built, test_the_kernel_equals_the_definition_on_edge_cases
from test_decode import (
    test_a_sequence_does_not_depend_on_the_rest_of_the_batch,
    test_steps_after_a_prompt_give_the_hidden_states_of_one_pass,
)
from test_ops import (
    test_adamw_on_split_master_weights_is_adamw,
    test_attention_of_part_of_a_sequence_and_within_documents,
    test_few_rows_linear,
    test_linear_cross_entropy,
    test_norm_and_rotation_of_heads,
    test_rms_norm,
    test_rope_rotates_in_place_and_back,
    test_sum_of_squares_does_not_depend_on_threads,
    test_swiglu,
)

from megacoder.core.native import native
from megacoder.ops import backends, cpp

__all__ = [
    "built", "test_a_sequence_does_not_depend_on_the_rest_of_the_batch", "test_adamw_on_split_master_weights_is_adamw",
    "test_attention_of_part_of_a_sequence_and_within_documents", "test_few_rows_linear", "test_linear_cross_entropy",
    "test_norm_and_rotation_of_heads", "test_rms_norm", "test_rope_rotates_in_place_and_back",
    "test_steps_after_a_prompt_give_the_hidden_states_of_one_pass", "test_sum_of_squares_does_not_depend_on_threads",
    "test_swiglu", "test_the_kernel_equals_the_definition_on_edge_cases",
]  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these ops run on the GPU here"),
]


@pytest.fixture(params=range(1, getattr(native(), "num_tables", 1)))
def backend(request, monkeypatch):
    """In the place of conftest's: each further table in turn."""
    monkeypatch.setattr(cpp, "has_amx", lambda: False)
    backends.candidates.cache_clear()
    fastest = native().isa()
    native().use_table(request.param)
    assert native().isa() != fastest
    yield "compiled"
    native().use_table(0)
    backends.candidates.cache_clear()


@pytest.mark.skipif(not hasattr(native(), "num_tables"), reason="the kernels are not built")
def test_there_is_no_table_beyond_the_last():
    with pytest.raises(IndexError):
        native().use_table(native().num_tables)
