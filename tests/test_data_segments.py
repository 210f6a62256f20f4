"""Labels, position ids and cu_seqlens read off packed windows."""

import torch

from megacoder.data.segments import cu_seqlens, document_starts, next_token_labels, position_ids

BOS, EOS = 90, 91
WINDOWS = torch.tensor([[BOS, 1, 2, EOS, BOS, 3, EOS], [4, EOS, BOS, EOS, BOS, 5, 6]])


def test_labels_stop_at_the_next_document():
    labels = next_token_labels(WINDOWS, bos_id=BOS, eos_id=EOS)
    assert labels.tolist() == [[1, 2, EOS, -100, 3, EOS], [EOS, -100, EOS, -100, 5, 6]]


def test_labels_without_bos_stop_after_eos():
    windows = torch.tensor([[1, 2, EOS, 3, 4]])
    assert next_token_labels(windows, bos_id=None, eos_id=EOS).tolist() == [[2, EOS, -100, 4]]


def test_documents_start_at_bos_and_at_the_window():
    starts = document_starts(WINDOWS, bos_id=BOS, eos_id=EOS)
    assert starts.int().tolist() == [[1, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0, 0]]
    assert position_ids(starts).tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 0, 1, 2]]
    assert cu_seqlens(starts).tolist() == [0, 4, 7, 9, 11, 14]
    assert cu_seqlens(starts).dtype == torch.int32


def test_documents_start_after_eos_where_there_is_no_bos():
    starts = document_starts(torch.tensor([[1, EOS, 2, EOS]]), bos_id=None, eos_id=EOS)
    assert starts.tolist() == [[True, False, True, False]]
