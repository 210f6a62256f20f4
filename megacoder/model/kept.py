"""What a layer keeps between its forward and its backward, and what its postponed weight gradients keep after that.

Legend: D model dim, C fused QKV dim, F feed-forward dim, H query heads, G key-value heads, K head dim; B sequences of S
tokens, T = B * S on this rank, N of them in the residual stream. All but D are this rank's share.
`megacoder.model.scheduled` keeps these tensors; schedules and plans count their bytes.
"""

from typing import Literal

from megacoder.model.config import ModelConfig
from megacoder.parallel.tensor import ALONE, TensorParallel

__all__ = [
    "Recompute",
    "kept_bytes_per_token",
    "kept_weight_bytes",
    "waiting_bytes_per_token",
    "waiting_share",
]

Recompute = Literal["none", "norms", "selective", "full"]
"""What a layer recomputes in its backward instead of keeping. Every result has the same bits.

Kept per token and layer, H * K being the query heads' columns (D in most models) and e the bytes of the weights' dtype;
D is scaled by N / T under sequence parallelism:

none       e * (4 D + C + H K + 2 F) + 4 H + 8   everything that the backward reads
norms      e * (2 D + C + H K + 2 F) + 4 H       both norms are recomputed, each in one pass over its input
selective  e * (2 D + C + H K) + 4 H             both norms and the gate-up product are recomputed: the widest tensors
                                                 for one product of 2 D F multiply-adds. Attention is not, unlike in
                                                 arXiv:2205.05198, where scores would be kept: here there are none
full       e * D                                 the layer's input alone; all of the forward but the last product is
                                                 rerun, under tensor parallelism with its collectives

With `qk_norm` "none" keeps e * (H + G) K more: queries and keys both as projected, which the norms' backward reads, and
as attention has read them. The others make the latter again from the former, in one pass.

For D = 2048, F = 5504, C = 3 D in bf16: 54.9 kB, 46.7 kB, 24.6 kB and 4.1 kB. `kept_bytes_per_token` computes it.

In fp8 "none" keeps the transposed casts of the four linears' inputs. Those of the normed inputs replace the tensors
that they are cast from (except under sequence parallelism, where the N uncast tokens are kept instead of a cast of T).
Those of the attention output and of the activation, H K + F bytes, are kept in addition, since recomputing them would
move 4 H K + 6 F bytes. "none" also keeps the transposed weights, one byte each (`kept_weight_bytes`). "norms" keeps all
of that except the casts of the normed inputs. The others keep the same as in bf16, and cast again.
"""


def kept_bytes_per_token(
    model: ModelConfig, recompute: Recompute, *, itemsize: int, tp: TensorParallel = ALONE, fp8: bool = False
) -> float:
    """What one layer keeps of each of this rank's T tokens, by the formula above."""
    stream = 1 / tp.size if tp.sequence_parallel else 1.0
    d, (heads, _, c, hk, f) = model.hidden_size * stream, model.local_sizes(tp.size)
    if recompute == "full":
        return itemsize * d
    if recompute == "selective":
        return itemsize * (2 * d + c + hk) + 4 * heads
    kept = itemsize * (2 * d + c + hk + 2 * f) + 4 * heads
    if recompute == "norms":
        return kept + (hk + f if fp8 else 0)
    kept += itemsize * (2 * d + model.normed_columns(tp.size)) + 8 * stream
    if not fp8:
        return kept
    return kept + hk + f - (0 if tp.shares_tokens else 2 * (itemsize - 1) * d)


def kept_weight_bytes(model: ModelConfig, recompute: Recompute, *, tp: TensorParallel = ALONE, fp8: bool) -> int:
    """Bytes of weight casts that one layer keeps for every microbatch that waits for its backward."""
    return model.local_matmul_params(tp.size) if fp8 and recompute in ("none", "norms") else 0


def waiting_bytes_per_token(
    model: ModelConfig, *, itemsize: int, tp: TensorParallel = ALONE, fp8: bool = False
) -> float:
    """What one layer's postponed weight gradients keep of each of this rank's T tokens, whatever `Recompute` is.

    The inputs and output gradients of its four linears, of all tokens (gathered under sequence parallelism); in fp8
    their casts.
    """
    d, (_, _, c, hk, f) = model.hidden_size, model.local_sizes(tp.size)
    return (1 if fp8 else itemsize) * (4 * d + c + hk + 3 * f)


def waiting_share(model: ModelConfig, recompute: Recompute, *, tp: TensorParallel = ALONE, fp8: bool = False) -> float:
    """The same as a share of what the layer keeps between forward and backward, in bf16.

    For D = 2048, F = 5504, C = 3 D: 1.2, 1.4, 2.7 and 16.1 from "none" to "full".
    """
    kept = kept_bytes_per_token(model, recompute, itemsize=2, tp=tp, fp8=fp8)
    return waiting_bytes_per_token(model, itemsize=2, tp=tp, fp8=fp8) / kept
