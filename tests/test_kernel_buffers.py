"""The compiled kernels' assumptions about buffers are checked before they receive an address."""

import pytest
import torch

from megacoder.ops.cpp import address

WANTED = (torch.int64, 2)


def test_a_buffer_of_dtype_and_shape_passes():
    buffer = torch.zeros(2, dtype=torch.int64)
    assert address(buffer, *WANTED) == buffer.data_ptr()
    assert address(None, *WANTED) == 0


@pytest.mark.parametrize(
    "buffer",
    [torch.zeros(2, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)[::2], torch.zeros(3, dtype=torch.int64)],
    ids=["dtype", "strides", "shape"],
)
def test_a_buffer_that_a_kernel_would_misread_is_refused(buffer):
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        address(buffer, *WANTED)
