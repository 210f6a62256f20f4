"""Softmax and cross-entropy in place over rows of logits; the ops are described in `megacoder.ops.cross_entropy`.

Legend: C tokens of a chunk, W columns of a row (this rank's vocabulary and its padding); within a kernel B columns.

One program reads a row twice in blocks of TILE: for its maximum and sum, then for its softmax. Held in registers it
would be read once (32,256 columns take 1,024 threads), but then one program fills a multiprocessor, and memory idles
while it reduces and exponentiates. Here several programs share a multiprocessor, each in a different phase, and the
second read comes from L2: of the rows in flight, 34 MB at W=32,256, half is still to be read again. The blocks' maxima
and sums are combined online, so two passes suffice.

The kernel is bound by instructions: while an H200 copies the logits in bf16, its schedulers can issue 28 per element,
and with masks in every block the two loops had 33. So only the last block is masked, which leaves the others with 22,
and the label's column is corrected afterwards.

A row that is not trained on is treated as having no columns: the first pass does not read it, and all of it is padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacoder.ops.triton_kernels.launch import ceil_div, check, power_of_two, storage, warps

__all__ = ["cross_entropy_", "rescale_subtract_", "softmax_"]

TILE = 8192
"""Columns of a block: with 32 of them per thread, each thread has four 16-byte loads in flight."""
IGNORE_INDEX = tl.constexpr(-100)
"""The op's; not imported, since the op may itself import this module."""
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest float. Starting the maximum at minus infinity would make a block of such logits NaN."""


@triton.jit
def _with_block(top, total, logits_B):
    """Updates (maximum, sum of exponentials relative to it) by a block."""
    new_top = tl.maximum(top, tl.max(logits_B, axis=0))
    return new_top, total * tl.exp(top - new_top) + tl.sum(tl.exp(logits_B - new_top), axis=0)


@triton.jit
def softmax_kernel(logits_ptr, labels_ptr, out_ptr, VOCAB: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """With labels the output is the loss and onehot is subtracted from the softmax; without, it is the log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * W
    vocab = VOCAB
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        vocab = tl.where(label == IGNORE_INDEX, 0, vocab)
        target = tl.load(logits_ptr + label, mask=vocab > 0, other=0.0).to(tl.float32)

    whole = vocab // BLOCK * BLOCK  # Up to here no block needs a mask, which is a third of the instructions.
    top = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, whole, BLOCK):
        # Kept in L2 until the second pass; what that reads and writes is not needed again.
        logits_B = tl.load(logits_ptr + first + tl.arange(0, BLOCK), eviction_policy="evict_last")
        top, total = _with_block(top, total, logits_B.to(tl.float32))
    for first in range(whole, vocab, BLOCK):
        cols_B = first + tl.arange(0, BLOCK)
        # Read up to W, which is aligned, not to vocab, which may not be, so that loads stay 16 bytes wide.
        logits_B = tl.load(logits_ptr + cols_B, mask=cols_B < W, other=0.0, eviction_policy="evict_last")
        logits_B = tl.where(cols_B < vocab, logits_B.to(tl.float32), float("-inf"))
        top, total = _with_block(top, total, logits_B)

    inverse = 1.0 / total
    for first in range(0, whole, BLOCK):
        cols_B = first + tl.arange(0, BLOCK)
        logits_B = tl.load(logits_ptr + cols_B, eviction_policy="evict_first").to(tl.float32)
        softmax_B = tl.exp(logits_B - top) * inverse
        tl.store(logits_ptr + cols_B, softmax_B.to(logits_ptr.dtype.element_ty), eviction_policy="evict_first")
    for first in range(whole, W, BLOCK):
        cols_B = first + tl.arange(0, BLOCK)
        logits_B = tl.load(logits_ptr + cols_B, mask=cols_B < W, other=0.0, eviction_policy="evict_first")
        softmax_B = tl.where(cols_B < vocab, tl.exp(logits_B.to(tl.float32) - top) * inverse, 0.0)
        softmax_B = softmax_B.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + cols_B, softmax_B, mask=cols_B < W, eviction_policy="evict_first")

    if labels_ptr is not None:
        tl.debug_barrier()  # A different thread has stored this column.
        label_softmax = tl.exp(target - top) * inverse
        tl.store(logits_ptr + label, (label_softmax - 1.0).to(logits_ptr.dtype.element_ty), mask=vocab > 0)
        # In this order the digits of the sum survive a huge maximum.
        tl.store(out_ptr + row, tl.where(vocab > 0, tl.log(total) - (target - top), 0.0))
    else:
        tl.store(out_ptr + row, top + tl.log(total))


@triton.jit
def rescale_subtract_kernel(probs_ptr, scale_ptr, rows_ptr, owned_ptr, W: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.where(tl.load(owned_ptr + token), tl.load(rows_ptr + token), -1)
    places_B = token * W + cols_B
    probs_B = tl.load(probs_ptr + places_B, mask=cols_B < W, other=0.0).to(tl.float32)
    probs_B *= tl.load(scale_ptr + token)
    probs_B = tl.where(cols_B == column, probs_B - 1.0, probs_B)
    tl.store(probs_ptr + places_B, probs_B.to(probs_ptr.dtype.element_ty), mask=cols_B < W)


def cross_entropy_(logits_CW: Tensor, labels_C: Tensor, *, vocab: int) -> Tensor:
    """Token losses (C,) fp32; overwrites the logits with softmax - onehot.

    The gradient is zero in the W - vocab columns of padding and where the label is IGNORE_INDEX. Every other label
    must be in [0, vocab): the kernel does not check.
    """
    check("labels_C", labels_C, torch.int64, len(logits_CW))
    return _softmax_(logits_CW, labels_C, vocab)


def softmax_(logits_CW: Tensor, *, vocab: int) -> Tensor:
    """Log-sum-exp (C,) fp32 of the first `vocab` columns, -inf if there are none; overwrites the logits with softmax.

    The softmax is zero in the W - vocab columns of padding.
    """
    return _softmax_(logits_CW, None, vocab)


def rescale_subtract_(probs_CW: Tensor, scale_C: Tensor, rows_C: Tensor, owned_C: Tensor) -> None:
    """Multiplies each token's probabilities by its scale and, where `owned_C`, subtracts 1 in column `rows_C`.

    A rank that holds part of the vocabulary calls it once it knows the other ranks' log-sum-exps.
    """
    num_rows, width = probs_CW.shape
    check("probs_CW", probs_CW, storage("probs_CW", probs_CW), num_rows, width)
    check("scale_C", scale_C, torch.float32, num_rows)
    check("rows_C", rows_C, torch.int64, num_rows)
    check("owned_C", owned_C, torch.bool, num_rows)
    if num_rows:
        block, num_warps = _tile(width)
        rescale_subtract_kernel[(num_rows, ceil_div(width, block))](
            probs_CW, scale_C, rows_C, owned_C, W=width, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False
        )


def _softmax_(logits_CW: Tensor, labels_C: Tensor | None, vocab: int) -> Tensor:
    num_rows, width = logits_CW.shape
    check("logits_CW", logits_CW, storage("logits_CW", logits_CW), num_rows, width)
    if not 0 <= vocab <= width:
        raise ValueError(f"a vocabulary of {vocab} ids does not fit in rows of {width} columns")
    out_C = logits_CW.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        block, num_warps = _tile(width)
        softmax_kernel[(num_rows,)](
            logits_CW, labels_C, out_C,
            VOCAB=vocab, W=width, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out_C


def _tile(width: int) -> tuple[int, int]:
    """(columns, warps) of a block."""
    block = min(TILE, power_of_two(width))
    return block, warps(block, per_thread=32)
