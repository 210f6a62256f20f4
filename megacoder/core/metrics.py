"""Arithmetic that every report shares: FLOPs per token, with attention counted in full or under its causal mask.

One file, so that two figures with one name cannot mean two things.
"""

__all__ = ["attention_flops_per_token", "training_flops_per_token"]


def attention_flops_per_token(*, layers: int, heads: int, head_dim: int, seq_length: int, causal: bool) -> float:
    """Training FLOPs per token of the score and value products.

    Full (PaLM, arXiv:2204.02311, appendix B): 12 * layers * heads * head_dim * seq; causal counts the half that a
    causal mask leaves.
    """
    full = 12.0 * layers * heads * head_dim * seq_length
    return full / 2 if causal else full


def training_flops_per_token(num_matmul_params: int, attention_flops: float) -> float:
    """6 FLOPs per weight that takes part in a matrix product, forward and backward, plus attention's own."""
    return 6.0 * num_matmul_params + attention_flops
