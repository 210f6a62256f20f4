"""One process's training step: ours, transformers' Llama eager or compiled, and the bare matrix products."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from megacoder.core.config import from_dict
from megacoder.core.memory import keep_freed_memory, return_freed_memory
from megacoder.model.config import ModelConfig
from megacoder.model.init import init_weights
from megacoder.model.stage import Microbatch, Stage
from megacoder.model.transformer import Transformer
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.cross_entropy import LossSum
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.layers import Linear
from megacoder.parallel.zero import Zero1AdamW

__all__ = ["COMPILED", "EAGER", "OURS", "PRODUCTS", "build"]

OURS, EAGER, COMPILED, PRODUCTS = "megacoder", "transformers eager", "transformers compiled", "matrix products alone"

Update = Callable[[Tensor, Tensor], float]


def build(job: dict[str, Any]) -> Callable[[], float]:
    """`job`: contender's `name`, `model` config, `dtype`, `batch`, `sequence`. Every step has other tokens."""
    config, dtype = from_dict(ModelConfig, job["model"], where="model"), getattr(torch, job["dtype"])
    if job["name"] == OURS:
        update = _ours(config, dtype)
    elif job["name"] == PRODUCTS:
        update = _matrix_products(config, dtype, job["batch"] * job["sequence"])
    else:
        update = _transformers_llama(config, dtype, compiled=job["name"] == COMPILED)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        data = torch.randint(0, config.vocab_size, (job["batch"], job["sequence"] + 1), generator=generator)
        return update(data[:, :-1].contiguous(), data[:, 1:].contiguous())

    return step


def _ours(config: ModelConfig, dtype: torch.dtype) -> Update:
    """The hand-scheduled step with fp32 gradients, master weights and moments, its norms formed again."""
    keep_freed_memory()  # as `megacoder train` does
    model = Transformer(config)
    flat = FlatParameters(model.named_parameters(), dtype=dtype, device=torch.device("cpu"))
    init_weights(model, seed=0)
    optimizer = Zero1AdamW(flat, None, AdamWConfig())
    return_freed_memory()  # as its engine does
    stage = Stage.whole(model, recompute="norms")
    first = True

    def update(tokens: Tensor, labels: Tensor) -> float:
        nonlocal first
        loss, saved = stage.forward(None, Microbatch.of(tokens, labels))
        assert isinstance(loss, LossSum)
        stage.backward(None, saved)
        optimizer.step(lr=1e-4, num_tokens=loss.num_tokens, max_grad_norm=1.0)
        if first:
            return_freed_memory()  # as its engine does
        first = False
        return loss.total.item() / loss.num_tokens

    return update


def _transformers_llama(config: ModelConfig, dtype: torch.dtype, *, compiled: bool) -> Update:
    """LlamaForCausalLM, SDPA attention, torch's fused AdamW and gradient clipping."""
    peer: torch.nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, head_dim=config.head_dim,
            intermediate_size=config.intermediate_size, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=False,
        )
    )  # fmt: skip
    peer.to(dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(peer) if compiled else peer

    def update(tokens: Tensor, labels: Tensor) -> float:
        loss = run(input_ids=tokens, labels=tokens, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return update


def _matrix_products(config: ModelConfig, dtype: torch.dtype, num_tokens: int) -> Update:
    """Every linear layer's three products (forward, input gradient, weight gradient) and nothing else."""
    model = Transformer(config)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    shapes = [linear.weight.shape for linear in linears if linear is not model.embed_tokens]
    data = {
        shape: (
            torch.randn(num_tokens, shape[1], dtype=dtype),
            torch.randn(shape, dtype=dtype),
            torch.randn(num_tokens, shape[0], dtype=dtype),
        )
        for shape in set(shapes)
    }

    def update(tokens: Tensor, labels: Tensor) -> float:
        for shape in shapes:
            x, weight, grad = data[shape]
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)
        return 0.0

    return update
