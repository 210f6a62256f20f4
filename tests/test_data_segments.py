"""Position ids and cu_seqlens of packed windows."""

import torch

from megacoder.data.segments import cu_seqlens, position_ids


def test_positions_and_lengths_restart_with_each_document():
    starts = torch.tensor([[1, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0, 0]]).bool()
    assert position_ids(starts).tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 0, 1, 2]]
    assert cu_seqlens(starts).tolist() == [0, 4, 7, 9, 11, 14]
    assert cu_seqlens(starts).dtype == torch.int32
