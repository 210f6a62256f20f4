"""Measured against planned memory, per rank and kind, in 30 layouts.

Standing memory is the flat buffers' and the optimizer's tensors. Activations are counted as they are kept: after every
action of the pipeline all tensors that its microbatches' backwards can still reach are added up, each storage once.
Buffers are short-lived: the peak growth of torch's memory in a step (by its profiler) less the peak of what was kept,
though the two need not peak at the same moment.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from unittest.mock import patch

import torch
from ranks import RankPool
from torch import Tensor, nn

from megacoder.core.console import say, table
from megacoder.data.synthetic import SyntheticStream
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.model.stage import Microbatch
from megacoder.ops import cpp
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.backends import candidates
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World
from megacoder.train.engine import Engine
from megacoder.train.layout import LayoutRequest
from megacoder.train.memory_table import largest_growth, standing_rows
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.memory import rank_memory
from megacoder.train.planning.search import variant_pipeline

__all__ = ["ALLOWED", "CASES", "KINDS", "Case", "check_memory", "measure", "without_tiles"]

ALLOWED = 0.05
"""Largest relative error of a rank's bytes of a kind."""
KINDS = ("weights", "gradients", "optimizer", "activations", "buffers", "total")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout to allocate."""

    ranks: int
    parallel: ParallelConfig
    recompute: str = "none"
    dtype: torch.dtype = torch.float32
    micro_batch_size: int = 2
    kv_heads: int = 4
    tied: bool = False
    bias: bool = False
    qk_norm: bool = False
    microbatches: int = 5
    seq_length: int = 64

    @property
    def job(self) -> Job:
        dp = self.parallel.dims(self.ranks).dp
        return Job(
            model=ModelConfig(
                vocab_size=500, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=8,
                num_key_value_heads=self.kv_heads, head_dim=16, max_position_embeddings=256,
                tie_word_embeddings=self.tied, qkv_bias=self.bias, qk_norm=self.qk_norm,
            ),
            seq_length=self.seq_length, global_batch_size=self.microbatches * self.micro_batch_size * dp,
            itemsize=self.dtype.itemsize,
        )  # fmt: skip

    @property
    def request(self) -> LayoutRequest:
        job = self.job
        return LayoutRequest(
            model=job.model, parallel=self.parallel, seq_length=job.seq_length,
            global_batch_size=job.global_batch_size, micro_batch_size=self.micro_batch_size,
            execution=ExecutionConfig(recompute=self.recompute),  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def variant(self) -> Variant:
        return Variant.of(self.request, self.request.check(self.ranks))

    def __str__(self) -> str:
        of_model = {f"{self.kv_heads} kv heads": self.kv_heads != 4, "tied": self.tied, "biases": self.bias,
                    "normed heads": self.qk_norm}  # fmt: skip
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([str(self.variant), dtype, *(name for name, holds in of_model.items() if holds)])


def _case(ranks: int, parallel: dict[str, Any], **more: Any) -> Case:
    return Case(ranks=ranks, parallel=ParallelConfig(**parallel), **more)


BF16 = torch.bfloat16
CASES = [
    _case(1, {}),
    _case(1, {}, dtype=BF16),
    _case(1, {}, recompute="selective"),
    _case(1, {}, recompute="full", dtype=BF16),
    _case(1, {}, recompute="norms", dtype=BF16),
    _case(1, {}, tied=True, micro_batch_size=4),
    _case(2, {"tp": 2}),
    _case(2, {"tp": 2, "sequence_parallel": False}, recompute="selective"),
    _case(4, {"tp": 4}, kv_heads=2, dtype=BF16),
    _case(2, {}, dtype=BF16),
    _case(4, {"bucket_elements": 10_000}),
    _case(2, {"cp": 2}, seq_length=128),
    _case(2, {"pp": 2}),
    _case(4, {"pp": 4}, recompute="selective"),
    _case(4, {"pp": 4, "schedule": "gpipe"}, recompute="full"),
    _case(2, {"pp": 2, "schedule": "interleaved", "chunks": 2}),
    _case(4, {"pp": 4, "schedule": "zb-h1"}),
    _case(2, {"pp": 2, "schedule": "zbv"}, dtype=BF16),
    _case(4, {"pp": 2, "tp": 2, "schedule": "zbv"}),
    _case(4, {"pp": 2, "schedule": "dualpipev"}, microbatches=8, tied=True),
    _case(4, {"cp": 2, "tp": 2}, recompute="selective", seq_length=128),
    _case(4, {"pp": 4, "schedule": "zb-h1"}, recompute="selective"),
    _case(2, {"pp": 2, "schedule": "zbv"}, recompute="full", dtype=BF16),
    _case(4, {"pp": 2, "tp": 2, "schedule": "dualpipev"}, recompute="norms"),
    _case(2, {"tp": 2}, recompute="norms"),
    _case(4, {"pp": 4, "schedule": "zb-h1"}, recompute="norms"),
    _case(2, {"pp": 2, "schedule": "gpipe", "layers_per_stage": (3, 1)}, recompute="norms", microbatches=9),
    _case(4, {"cp": 2, "tp": 2}, recompute="norms", seq_length=128),
    _case(2, {"tp": 2}, kv_heads=1, qk_norm=True),
    _case(2, {"tp": 2}, recompute="selective", qk_norm=True),
]


@contextmanager
def without_tiles() -> Iterator[None]:
    """With the kernels of CPUs without AMX. Those on tiles hold so little that oneDNN's own memory shows, which is not
    planned: 38 kB for the products of these tiny models."""
    with patch.object(cpp, "has_amx", lambda: False):
        candidates.cache_clear()
        try:
            yield
        finally:
            candidates.cache_clear()


def check_memory(*, quiet: bool) -> dict[str, Any]:
    """All cases; prints a table unless `quiet`."""
    rows = []
    with RankPool() as pool, without_tiles():
        for case in CASES:
            measured = pool.run(case.ranks, measure, case, timeout_seconds=300.0)
            pipe, job, variant = variant_pipeline(case.job, case.variant), case.job, case.variant
            row: dict[str, Any] = {"layout": str(case), "kinds": {}}
            for kind in KINDS:
                errors = []
                for (pp_rank, cp_rank), counted in measured:
                    memory = rank_memory(job, variant, pipe, pp_rank, device_type="cpu", cp_rank=cp_rank)
                    said = getattr(memory, kind)
                    errors.append((said / counted[kind] - 1 if counted[kind] else 0.0, said, counted[kind]))
                worst = max(errors, key=lambda entry: abs(entry[0]))
                row["kinds"][kind] = dict(zip(("error", "predicted", "allocated"), worst, strict=True))
            rows.append(row)
            if not quiet:
                say(f"{case}: " + ", ".join(f"{k} {v['error']:+.1%}" for k, v in row["kinds"].items()))
    largest = {kind: max(abs(row["kinds"][kind]["error"]) for row in rows) for kind in KINDS}
    result = {
        "layouts": rows, "largest_error": largest, "holds": all(largest[kind] <= ALLOWED for kind in KINDS),
    }  # fmt: skip
    if not quiet:
        table(
            "Bytes predicted against allocated: error of the rank that is farthest off",
            ["layout", *KINDS],
            [[row["layout"], *(f"{row['kinds'][k]['error']:+.1%}" for k in KINDS)] for row in rows],
        )
        print("largest: " + ", ".join(f"{kind} {error:.1%}" for kind, error in largest.items()))
    return result


@without_tiles()
def measure(world: World, case: Case) -> tuple[tuple[int, int], dict[str, int]]:
    """((pipeline rank, context parallel rank), bytes by kind) of one rank; all ranks of the case call it."""
    torch.set_num_threads(1)
    job, request = case.job, case.request
    layout = request.layout(world.size)
    mesh = Mesh(world, layout.dims, sequence_parallel=case.parallel.sequence_parallel)
    engine = Engine(
        job.model, layout, mesh, execution=request.execution,
        bucket_elements=case.parallel.bucket_elements, optimizer=AdamWConfig(), dtype=case.dtype, seed=1,
    )  # fmt: skip
    batches = SyntheticStream(
        vocab_size=job.model.vocab_size, seq_length=job.seq_length, global_batch_size=job.global_batch_size,
        dp_rank=mesh.place.dp, dp_size=mesh.dims.dp,
    )  # fmt: skip
    microbatches = engine.microbatches(batches.next_batch(), case.micro_batch_size)
    engine.forward_backward(microbatches)
    growth = _growth(lambda: engine.forward_backward(microbatches))
    standing = {storage.data_ptr() for storage in (engine.flat.weight.untyped_storage(),
                                                   engine.flat.grad.untyped_storage())}  # fmt: skip
    ledger = _Ledger(standing)
    runner = engine._training
    runner.stages = [_Counted(stage, ledger) for stage in runner.stages]
    engine.forward_backward(microbatches)
    weights, gradients, optimizer = (row.num_bytes for row in standing_rows(engine))
    total = weights + gradients + optimizer + max(growth, ledger.most)
    return (mesh.place.pp, mesh.place.cp), {
        "weights": weights, "gradients": gradients, "optimizer": optimizer,
        "activations": ledger.most, "buffers": max(0, growth - ledger.most), "total": total,
    }  # fmt: skip


def _growth(step: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = step()
    del kept
    return largest_growth(recorded)


class _Ledger:
    """Storages that backwards still need, by who keeps them."""

    def __init__(self, standing: set[int]) -> None:
        self.standing, self.kept, self.most = standing, dict[int, dict[int, int]](), 0

    def keep(self, owner: object, root: object) -> None:
        self.kept[id(owner)] = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(root)
        }
        union = {place: size for kept in self.kept.values() for place, size in kept.items()}
        self.most = max(self.most, sum(size for place, size in union.items() if place not in self.standing))

    def drop(self, owner: object) -> None:
        del self.kept[id(owner)]


class _Counted:
    """A stage whose kept tensors are counted."""

    def __init__(self, stage: Any, ledger: _Ledger) -> None:
        self._stage, self._ledger = stage, ledger

    def new_boundary(self, microbatch: Any) -> Tensor:
        return self._stage.new_boundary(microbatch)

    def forward(self, x: Tensor | None, microbatch: Any) -> tuple[Any, Any]:
        result, saved = self._stage.forward(x, microbatch)
        self._ledger.keep(saved, saved)
        return result, saved

    def backward(self, grad: Tensor | None, saved: Any) -> Tensor | None:
        self._ledger.drop(saved)
        return self._stage.backward(grad, saved)

    def backward_input(self, grad: Tensor | None, saved: Any) -> tuple[Tensor | None, Callable[[], None]]:
        self._ledger.drop(saved)
        result, rest = self._stage.backward_input(grad, saved)

        def weight_gradients() -> None:
            self._ledger.drop(rest)
            rest()

        self._ledger.keep(rest, rest)
        return result, weight_gradients


def _tensors(root: object) -> Iterator[Tensor]:
    """Every tensor that can be reached, but for weights and what a microbatch was given."""
    if isinstance(root, Tensor):
        yield root
    elif isinstance(root, (nn.Module, Microbatch)) or root is None:
        return
    elif isinstance(root, (list, tuple)):
        for item in root:
            yield from _tensors(item)
    elif is_dataclass(root):
        for field in fields(root):
            yield from _tensors(getattr(root, field.name))
    elif isinstance(root, MethodType):
        yield from _tensors(root.__self__)
    elif isinstance(root, partial):
        yield from _tensors(root.args)
    elif isinstance(root, FunctionType):
        for cell in root.__closure__ or ():
            yield from _tensors(cell.cell_contents)
