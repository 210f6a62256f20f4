"""One GPU's training step, called with its microbatches: ours, its matrix products alone, and peers in bf16."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from megacoder.core.errors import ConfigError
from megacoder.data.stream import Batch
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.linear import STORED, Factor, Precision, accumulate_weight_grad, linear_forward, linear_input_grad
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World
from megacoder.train.engine import Engine
from megacoder.train.layout import LayoutRequest

__all__ = ["Contender", "Data", "Step", "build"]

Contender = Literal["megacoder", "gemm", "liger", "transformers", "compiled", "plain", "torchtitan"]
"""See `bench_gpu.py`."""
Data = list[tuple[Tensor, Tensor]]
"""(tokens, labels) of every microbatch, on the CPU."""
Step = Callable[[Data], float]
"""One update; its loss, for which it waits."""


def build(
    name: Contender,
    config: ModelConfig,
    sequence: int,
    accumulate: int,
    execution: ExecutionConfig,
    *,
    document: int = 0,
) -> Step:
    """The step of a contender, ours with documents of so many tokens masked from each other where it is not 0.

    ConfigError where a peer is asked for what is ours.
    """
    if name == "megacoder":
        return _ours(config, sequence, accumulate, execution, document)
    for what, is_asked in (
        ("graph", execution.cuda_graph), ("documents", document), ("fp8", execution.fp8 and name != "gemm"),
        ("norms of heads", config.qk_norm and name != "gemm"),
    ):  # fmt: skip
        if is_asked:
            raise ConfigError(f"{name} has no {what} here")
    return _gemm(config, execution.precision) if name == "gemm" else _peer(name, config, sequence)


def _ours(config: ModelConfig, sequence: int, accumulate: int, execution: ExecutionConfig, document: int) -> Step:
    """The engine of `megacoder train` on one rank."""
    request = LayoutRequest(
        model=config, parallel=ParallelConfig(), seq_length=sequence, global_batch_size=accumulate, micro_batch_size=1
    )
    layout, device = request.layout(1), torch.device("cuda", 0)
    engine = Engine(
        config, layout, Mesh(World(0, 1, 0, device, None), layout.dims, sequence_parallel=False),
        execution=execution, bucket_elements=request.parallel.bucket_elements, optimizer=AdamWConfig(),
        dtype=torch.bfloat16, seed=0,
    )  # fmt: skip

    def step(data: Data) -> float:
        tokens, labels = map(torch.cat, zip(*data, strict=True))
        starts = (torch.arange(sequence) % document == 0).expand(tokens.shape) if document else None
        batch = Batch(tokens=tokens, labels=labels, starts=starts)
        microbatches = engine.microbatches(batch, len(data[0][0]))
        loss_sum, num_tokens = engine.sum_losses(engine.forward_backward(microbatches))
        engine.update(lr=1e-4, num_tokens=int(num_tokens), max_grad_norm=1.0)
        return loss_sum / num_tokens

    return step


def _peer(name: Contender, config: ModelConfig, sequence: int) -> Step:
    """A torch module that maps (tokens, labels) to a mean loss, with torch's fused AdamW."""
    make = {
        "liger": _liger, "transformers": _transformers, "compiled": _compiled, "plain": _plain,
        "torchtitan": _torchtitan,
    }[name]  # fmt: skip
    with torch.device("cuda"):
        module, loss_of = make(config, sequence)
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(data: Data) -> float:
        optimizer.zero_grad()  # an earlier step may have ended for want of memory
        total = torch.zeros((), device="cuda")
        for tokens, labels in data:
            loss = loss_of(tokens.cuda(), labels.cuda()) / len(data)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def _llama(config: ModelConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    return LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False, use_cache=False)).bfloat16().train()


def _transformers(config: ModelConfig, sequence: int) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    model = _llama(config)
    return model, lambda tokens, labels: model(input_ids=tokens, labels=tokens, shift_labels=labels).loss


def _liger(config: ModelConfig, sequence: int) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return _transformers(config, sequence)


def _compiled(config: ModelConfig, sequence: int) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    model = _llama(config)
    run = torch.compile(model)
    return model, lambda tokens, labels: run(input_ids=tokens, labels=tokens, shift_labels=labels).loss


def _plain(config: ModelConfig, sequence: int) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    from contenders.job import Job
    from contenders.plain_llama import LlamaPart, cross_entropy

    job = Job(
        row="dp", rank=0, dtype="bfloat16", num_microbatches=1, batch=1, sequence=sequence,
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers, num_heads=config.num_attention_heads,
    )  # fmt: skip
    model = LlamaPart(job).bfloat16()
    run = torch.compile(lambda tokens, labels: cross_entropy(model(tokens), labels))
    return model, run


def _torchtitan(config: ModelConfig, sequence: int) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    """Version 0.2.2; others divide the loss themselves.

    It wants torchdata, datasets, dill, multiprocess, xxhash, tomli and einops beside what transformers needs.
    """
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    model = Transformer(
        TransformerModelArgs(
            dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads, vocab_size=config.padded_vocab_size, max_seq_len=sequence,
            norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta,
            # It makes two thirds of four times the width into a multiple of this, for 1.3B the inner width itself.
            multiple_of=128,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.init_weights()
    inner = model.layers["0"].feed_forward.w1.out_features
    if inner != config.intermediate_size:
        raise ConfigError(f"torchtitan's inner width is {inner}, the model's {config.intermediate_size}")
    model.bfloat16()  # rotations, too, would be rounded; they are complex and stay
    for name, layer in list(model.layers.named_children()):
        model.layers.register_module(name, torch.compile(layer, fullgraph=True))
    loss_of = torch.compile(cross_entropy_loss)
    return model, lambda tokens, labels: loss_of(model(tokens), labels) / labels.numel()


def _gemm(config: ModelConfig, precision: Precision) -> Step:
    """Every linear layer's three products at the step's shapes, weight gradients added up in fp32.

    In fp8 the layers' matrices are cast beforehand.
    """
    random = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    dim, inner = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = [(qkv, dim), (dim, config.num_attention_heads * config.head_dim), (2 * inner, dim), (dim, inner)]
    head = config.padded_vocab_size, dim

    @cache
    def factors(shape: tuple[int, int], rows: int, *, cast: bool) -> tuple[Factor, Factor, Factor, Tensor]:
        as_stored = precision if cast else STORED
        return (
            as_stored.input(random(rows, shape[1])), as_stored.weight(random(*shape)),
            as_stored.grad(random(rows, shape[0])), torch.zeros(shape, device="cuda"),
        )  # fmt: skip

    def products(x: Factor, weight: Factor, grad: Factor, total: Tensor) -> None:
        linear_forward(x, weight)
        linear_input_grad(grad, weight)
        accumulate_weight_grad(total, grad, x)

    def step(data: Data) -> float:
        for tokens, _ in data:
            rows = tokens.numel()
            for shape in layer * config.num_hidden_layers:
                products(*factors(shape, rows, cast=True))
            for part in tokens.flatten().split(8192):
                products(*factors(head, len(part), cast=False))
        return float("nan")

    return step
