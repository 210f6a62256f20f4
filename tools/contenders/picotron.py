"""picotron, imported from a checkout of it, with what stands between it and a CPU replaced.

Replaced: flash_attn (imported at the top, not called with FLASH_ATTEN=0), torch.cuda.synchronize after each transfer,
and its data loader, which wants a tokenizer and a data set. Its own training script takes fp32 on a CPU; with bf16 it
holds bf16 weights and AdamW state, and fp32 gradients under data parallelism.
"""

import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from contenders.job import Job, Step, clip_and_update
from contenders.plain_llama import fused_adamw

__all__ = ["build"]


def build(job_json: dict[str, Any]) -> Step:
    """`picotron` in the job is the folder of the checkout."""
    job_json = dict(job_json)
    sys.path.insert(0, job_json.pop("picotron"))
    job = Job.from_json(job_json)
    os.environ.update(FLASH_ATTEN="0", DEVICE="cpu", CONTEXT_PARALLEL="0", LOCAL_RANK=str(job.rank), DTYPE=job.dtype)
    torch.cuda.synchronize = lambda device=None: None
    _stub_flash_attn()
    manager = importlib.import_module("picotron.process_group_manager")
    manager.setup_process_group_manager(**{f"{axis}_size": 2 if axis == job.row else 1 for axis in ("tp", "pp", "dp")},
                                        cp_size=1)  # fmt: skip
    model = _model(job)
    optimizer = fused_adamw(model.parameters(), job)
    params = list(model.parameters())
    microbatches = _Microbatches(job)

    def step() -> float | None:
        if job.row == "pp":
            pipeline = importlib.import_module("picotron.pipeline_parallel.pipeline_parallel")
            shape = (job.batch, job.sequence, job.hidden_size)
            loss = pipeline.train_step_pipeline_1f1b(model, microbatches, shape, "cpu", job.torch_dtype)
        else:
            loss = _accumulate(model, microbatches)
        clip_and_update(params, optimizer, job, shared=job.row != "dp")
        if hasattr(model, "reset"):
            model.reset()
        return loss if job.row != "pp" or job.rank == 1 else None

    return step


class _Microbatches:
    """What its steps need of its data loader."""

    def __init__(self, job: Job) -> None:
        self.batches = [
            {"input_ids": tokens, "target_ids": labels, "position_ids": torch.arange(job.sequence).expand_as(tokens)}
            for tokens, labels in job.microbatches()
        ]
        self.grad_acc_steps = len(self.batches)
        self._cycle = self._forever()

    def __next__(self) -> dict[str, torch.Tensor]:
        return dict(next(self._cycle))

    def _forever(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.batches


def _model(job: Job) -> Any:
    config = types.SimpleNamespace(
        vocab_size=job.vocab_size, hidden_size=job.hidden_size, intermediate_size=job.intermediate_size,
        num_hidden_layers=job.num_layers, num_attention_heads=job.num_heads, num_key_value_heads=job.num_heads,
        max_position_embeddings=job.sequence, rms_norm_eps=1e-6, rope_theta=10000.0,
    )  # fmt: skip
    model = importlib.import_module("picotron.model").Llama(config)
    if job.row == "tp":
        model = importlib.import_module("picotron.tensor_parallel.tensor_parallel").apply_tensor_parallel(model)
    if job.row == "pp":
        model = importlib.import_module("picotron.pipeline_parallel.pipeline_parallel").PipelineParallel(model, config)
    model.to(job.torch_dtype)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(0.0, 0.02)
    if job.row == "dp":
        model = importlib.import_module("picotron.data_parallel.data_parallel").DataParallelBucket(model)
    return model


def _accumulate(model: Any, microbatches: _Microbatches) -> float:
    """One step's forwards and backwards, as its training script does them; the mean loss."""
    total = 0.0
    for index in range(microbatches.grad_acc_steps):
        batch = next(microbatches)
        model.require_backward_grad_sync = index == microbatches.grad_acc_steps - 1
        logits = model(input_ids=batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["target_ids"].flatten()) / microbatches.grad_acc_steps
        loss.backward()
        total += loss.item()
    return total


def _stub_flash_attn() -> None:
    """Modules of that name with the three functions that picotron's model imports, none of which may be called."""

    def absent(*_: Any, **__: Any) -> None:
        raise RuntimeError("flash_attn is not here")

    for name, function in (
        ("flash_attn", None),
        ("flash_attn.flash_attn_interface", "flash_attn_func"),
        ("flash_attn.layers", None),
        ("flash_attn.layers.rotary", "apply_rotary_emb"),
        ("flash_attn.ops", None),
        ("flash_attn.ops.triton", None),
        ("flash_attn.ops.triton.layer_norm", "layer_norm_fn"),
    ):
        module = types.ModuleType(name)
        if function is not None:
            setattr(module, function, absent)
        sys.modules[name] = module
