"""The masks of packed documents as a varlen kernel receives them: pure arithmetic, compared with the mask itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.ops import attention, fused_attention
from megacoder.ops.attention import attention_backward, attention_forward, causal_mask
from megacoder.ops.fused_attention import DocumentMask, Pieces, cudnn_backward, flash_backward


def first_keys_of(begins, query_start, length):
    """Of one sequence whose documents begin at `begins`."""
    begins = torch.tensor(sorted({0, *begins}))
    places = torch.arange(query_start, query_start + length)
    return begins[torch.searchsorted(begins, places, right=True) - 1]


@settings(deadline=None, max_examples=60)
@given(
    begins=st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=3),
    query_start=st.integers(0, 20),
    length=st.integers(1, 12),
)
def test_the_pieces_attend_as_the_mask_allows(begins, query_start, length):
    mask = DocumentMask(torch.stack([first_keys_of(own, query_start, length) for own in begins]), query_start)
    num_keys = query_start + length
    pieces = mask.pieces
    # Every key of the batch has a number; a query of a piece sees the piece's keys up to its own.
    numbers = torch.arange(len(begins) * num_keys).view(len(begins), 1, num_keys, 1)
    seen_keys = pieces.seen(numbers, num_keys).flatten()
    assert len(seen_keys) == pieces.key_ends[-1]
    assert pieces.query_ends[-1] == len(begins) * length
    found = torch.zeros(len(begins) * length, len(begins) * num_keys, dtype=torch.bool)
    for piece in range(len(pieces.query_ends) - 1):
        queries = range(pieces.query_ends[piece], pieces.query_ends[piece + 1])
        keys = seen_keys[pieces.key_ends[piece] : pieces.key_ends[piece + 1]]
        assert len(queries) <= pieces.max_queries
        assert len(keys) <= pieces.max_keys
        for query in queries:
            found[query, keys[: len(keys) - (queries[-1] - query)]] = True
    places = torch.arange(query_start, num_keys)
    expected = causal_mask(places, num_keys, first_keys_BS=mask.first_keys_BS)[:, 0]
    for sequence in range(len(begins)):
        own = found[sequence * length : (sequence + 1) * length]
        assert torch.equal(own[:, sequence * num_keys : (sequence + 1) * num_keys], expected[sequence])
        own[:, sequence * num_keys : (sequence + 1) * num_keys] = False
        assert not own.any()


def test_gradients_go_back_to_the_keys_they_are_of():
    mask = DocumentMask(torch.tensor([[1, 1, 5], [3, 4, 4]]), query_start=3)
    keys = torch.arange(2.0 * 8).view(2, 1, 8, 1)  # two keys behind the last query
    back = mask.pieces.unseen(mask.pieces.seen(keys, 6), keys, 6)
    assert back.flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 11, 12, 13, 0, 0]


@pytest.mark.parametrize(("first_keys", "token"), [([[0, 0, 1, 2]], 2), ([[2, 2, 2, 2]], 0), ([[0, 1, 0, 0]], 2)])
def test_first_keys_that_are_not_documents_are_refused(first_keys, token):
    with pytest.raises(ValueError, match=f"the first key of token {token} of sequence 0 is"):
        _ = DocumentMask(torch.tensor(first_keys)).pieces


def test_a_mask_computes_its_pieces_once():
    mask = DocumentMask(torch.zeros(1, 4, dtype=torch.int64))
    assert mask.pieces is mask.pieces


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "flash, packed"])
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_that_read_lse_by_its_address_get_it_packed(kernel, batch, monkeypatch):
    received = []

    def of_torch(*args):
        q, k, v, lse = args[1], args[2], args[3], args[5]
        received.append(lse)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    monkeypatch.setattr(fused_attention, "_cudnn_backward", of_torch)
    monkeypatch.setattr(fused_attention, "_flash_backward", of_torch)
    heads = torch.empty(batch, 3, 8, 16, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(batch, 3, 16, device="meta")[:, :, 8:]  # one half of a context-parallel rank's tokens
    if kernel == "cudnn":
        cudnn_backward(*[heads] * 5, lse)
    else:
        first_keys = torch.zeros(batch, 8, dtype=torch.int64)
        pieces = Pieces.of(first_keys, 0, torch.device("meta"))
        documents = DocumentMask(first_keys, 0, pieces) if "packed" in kernel else None
        flash_backward(*[heads] * 5, lse, documents)
    assert received[0].is_contiguous()


def test_cudnns_backward_gets_output_and_gradient_packed_from_a_context_parallel_rank(monkeypatch):
    """Where they are halves of longer ones, and as `megacoder profile` makes them: torch keeps one plan for both."""
    batch, length, heads, dim = 2, 16, 3, 8
    received = []

    def of_torch(grad_out, q, k, v, out, *rest):
        received.append((grad_out, out))
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    monkeypatch.setattr(fused_attention, "_cudnn_backward", of_torch)
    monkeypatch.setattr(attention, "_backend", lambda *_: "cudnn")
    grad, out = torch.randn(2, batch, length, heads, dim)
    q, lse = torch.randn(batch, heads, length, dim), torch.randn(batch, heads, length)
    half = slice(0, length // 2)
    halves = grad[:, half], out[:, half]
    copies = [part.clone() for part in halves]
    for grad_half, out_half in (halves, copies):
        attention_backward(grad_half, q[:, :, half], q[:, :, half], q[:, :, half], out_half, lse[:, :, half])
    for pair in received:
        for found, expected in zip(pair, copies, strict=True):
            assert torch.equal(found, expected.transpose(1, 2))
            assert found.stride() == (length // 2 * heads * dim, dim, heads * dim, 1)
    assert [found.data_ptr() for found in received[1]] == [part.data_ptr() for part in copies], "copied without need"


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: refuses what would wait for it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("__int__", "__bool__", "__float__", "item", "tolist", "cpu", "nonzero"):
            raise AssertionError(f"{func.__name__} waits for the device")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_blocks_of_documents_known_on_the_host_wait_for_no_device(asked):
    asked("attention=torch")
    length = 200
    first_keys = torch.stack([first_keys_of(own, 0, length) for own in ([70, 130], [5])])
    q, k, v, grad = torch.randn(4, 2, 3, length, 16)
    results = []
    for mask in (
        DocumentMask(first_keys),
        DocumentMask(first_keys.as_subclass(OnDevice), 0, Pieces.of(first_keys, 0, torch.device("cpu"))),
    ):
        out, lse = attention_forward(q, k, v, documents=mask)
        grads = attention_backward(grad.transpose(1, 2), q, k, v, out, lse, documents=mask)
        results.append([tensor.as_subclass(torch.Tensor) for tensor in (out, lse, *grads)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)
