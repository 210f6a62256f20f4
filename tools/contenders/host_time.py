"""Host time of one layer's forward and backward: shapes so small that what is measured is Python and dispatch.

A tensor-parallel layer launches the same products and two collectives more each way. On a GPU that matters where
kernels are shorter than their launch, so the layer must not cost much more of the host than the plain one. Two groups
stand in for NCCL, whose launch lies between them: torch's fake one, which returns at once, and gloo with one rank,
which hands every collective to a thread. Only the calling thread's processor time is counted, not that of gloo's
threads, nor waiting.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megacoder.model.config import ModelConfig
from megacoder.model.init import init_weights
from megacoder.model.places import Places
from megacoder.model.scheduled import Shared, StreamGrad, WeightGradients, layer_backward, layer_forward
from megacoder.model.transformer import TransformerPart
from megacoder.parallel.context import UNCUT
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.tensor import ALONE, TensorParallel

__all__ = ["host_times"]

NUM_TOKENS = 16
REPEATS = 50
"""Layers timed as one, so that the clock's own steps do not show."""


def host_times(rounds: int) -> dict[str, dict[str, float]]:
    """By kind of layer and group: microseconds of a forward and backward, and how many times the plain layer's."""
    rows = {}
    for backend, size in (("fake", 2), ("gloo", 1)):
        with tempfile.TemporaryDirectory() as folder:
            store = FakeStore() if backend == "fake" else dist.FileStore(str(Path(folder) / "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=size)
            layers = {
                "plain": _layer(ALONE),
                "tensor parallel": _layer(TensorParallel(size=size, group=dist.group.WORLD)),
                "sequence parallel": _layer(TensorParallel(size=size, group=dist.group.WORLD, sequence_parallel=True)),
            }
            for name, row in _in_turns(layers, rounds).items():
                rows[f"{name}, {backend} group of {size}"] = row
            dist.destroy_process_group()
    return rows


def _in_turns(layers: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    micros: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(rounds + 1):
        for name, run in layers.items():
            begin = time.thread_time()
            for _ in range(REPEATS):
                run()
            if number:  # the first round warms up
                micros[name].append((time.thread_time() - begin) / REPEATS * 1e6)
    return {
        name: {
            "microseconds": round(statistics.median(found), 1),
            "times_plain": round(statistics.median(a / b for a, b in zip(found, micros["plain"], strict=True)), 3),
        }
        for name, found in micros.items()
    }


def _layer(tp: TensorParallel) -> Callable[[], None]:
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=NUM_TOKENS, rope_theta=10000.0,
    )  # fmt: skip
    model = TransformerPart(config, tp, cp=UNCUT, layers=[0], embedding=False, head=False)
    init_weights(model, seed=0)
    FlatParameters(model.named_parameters(), dtype=torch.float32, device=torch.device("cpu"))
    layer, device = model.decoder_layers()[0], torch.device("cpu")
    shared = Shared(tp, model.rope(device), Places.of((1, NUM_TOKENS), device=device))
    rows = NUM_TOKENS // (tp.size if tp.sequence_parallel else 1)
    stream, residual, grad = (torch.randn(rows, config.hidden_size) for _ in range(3))

    @torch.no_grad()
    def run() -> None:
        _, _, saved = layer_forward(layer, stream, residual, shared)
        layer_backward(layer, StreamGrad(grad), saved, shared, WeightGradients())

    return run
