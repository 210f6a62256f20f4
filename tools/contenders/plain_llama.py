"""A Llama as one writes it in plain torch: the model of the peers that bring none (DDP, torch's pipelines).

SDPA attention, `nn.RMSNorm`, separate projections, logits of all tokens at once into `F.cross_entropy`.
Legend: B sequences, S tokens, D model dim, H heads, K head dim.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contenders.job import Job

__all__ = ["LlamaPart", "cross_entropy", "fused_adamw"]


class Layer(nn.Module):
    """Attention and SwiGLU, each behind a norm."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        dim, inner = job.hidden_size, job.intermediate_size
        self.num_heads = job.num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
        normed = self.attention_norm(x_BSD)
        q, k, v = (
            project(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        q, k = _rotate(q, cos_SK, sin_SK), _rotate(k, cos_SK, sin_SK)
        out_BHSK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.out(out_BHSK.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x_BSD)
        return x_BSD + self.down(F.silu(self.gate(normed)) * self.up(normed))


class LlamaPart(nn.Module):
    """`layers` of the model, with embedding and head where asked; the whole of it by default."""

    def __init__(
        self, job: Job, layers: Iterable[int] | None = None, *, embedding: bool = True, head: bool = True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(job.vocab_size, job.hidden_size) if embedding else None
        self.layers = nn.ModuleList(Layer(job) for _ in (range(job.num_layers) if layers is None else layers))
        self.norm = nn.RMSNorm(job.hidden_size, eps=1e-6) if head else None
        self.head = nn.Linear(job.hidden_size, job.vocab_size, bias=False) if head else None
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=0.02)
        inverse = 10000.0 ** (-torch.arange(0, job.head_dim, 2).float() / job.head_dim)
        angles = torch.outer(torch.arange(job.sequence).float(), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, S), or (B, S, D) without an embedding -> logits, or (B, S, D) without a head."""
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def _rotate(x_BHSK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    first, second = x_BHSK.chunk(2, dim=-1)
    cos_SK, sin_SK = cos_SK.to(x_BHSK.dtype), sin_SK.to(x_BHSK.dtype)  # fp32 under autocast
    return x_BHSK * cos_SK + torch.cat([-second, first], dim=-1) * sin_SK


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over a microbatch, from fp32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def fused_adamw(params: Iterable[nn.Parameter], job: Job) -> torch.optim.Optimizer:
    """torch's fastest AdamW, its hyper-parameters those of ours."""
    return torch.optim.AdamW(params, lr=job.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
