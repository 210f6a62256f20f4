"""Megatron-Core with its local layers (no Transformer Engine), the calls that name CUDA answered for a CPU.

Its GPTModel, tensor parallelism, 1F1B schedule and DistributedDataParallel are used as they are. Its optimizers insist
on CUDA: torch's fused AdamW stands in. bf16 is its own: bf16 weights and, under data parallelism, bf16 gradients unless
`grad_reduce_in_fp32`; no fp32 master weights, which its optimizer would hold.
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from contenders.job import Job, Step, clip_and_update
from contenders.plain_llama import fused_adamw

__all__ = ["build"]

warnings.filterwarnings("ignore")


def build(job_json: dict[str, Any]) -> Step:
    """One update through Megatron's forward_backward_func."""
    job = Job.from_json(job_json)
    _answer_for_cuda()
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2 if job.row == "tp" else 1,
        pipeline_model_parallel_size=2 if job.row == "pp" else 1,
    )
    model = _model(job)
    params = list(model.parameters())
    optimizer = fused_adamw(params, job)
    microbatches = job.microbatches()
    positions = torch.arange(job.sequence).expand(job.batch, -1)
    run = get_forward_backward_func()

    def forward_step(batches: Iterator[tuple[Tensor, Tensor]], part: Any) -> tuple[Tensor, Any]:
        tokens, labels = next(batches)
        return part(tokens, positions, None, labels=labels), partial(_mean)

    def step() -> float | None:
        if job.row == "dp":
            model.zero_grad_buffer()
        losses = run(
            forward_step_func=forward_step, data_iterator=iter(microbatches), model=[model],
            num_microbatches=len(microbatches), seq_length=job.sequence, micro_batch_size=job.batch,
            forward_only=False,
        )  # fmt: skip
        if job.row == "dp":
            for param in params:
                param.grad = param.main_grad.to(param.dtype)
        clip_and_update(params, optimizer, job, shared=job.row != "dp")
        return sum(loss["loss"] for loss in losses) / len(losses) if losses else None

    return step


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, float]]:
    mean = losses.float().mean()
    return mean, {"loss": mean.item()}


def _model(job: Job) -> Any:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    first, last = job.layers_per_stage if job.row == "pp" else (None, None)
    config = TransformerConfig(
        num_layers=job.num_layers, hidden_size=job.hidden_size, ffn_hidden_size=job.intermediate_size,
        num_attention_heads=job.num_heads, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, bias_activation_fusion=False,
        bf16=job.dtype == "bfloat16", params_dtype=job.torch_dtype, pipeline_dtype=job.torch_dtype,
        tensor_model_parallel_size=2 if job.row == "tp" else 1,
        pipeline_model_parallel_size=2 if job.row == "pp" else 1,
        num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last,
    )  # fmt: skip
    model: Any = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=job.vocab_size,
        max_sequence_length=job.sequence, position_embedding_type="rope", share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    ).to(job.torch_dtype)  # fmt: skip
    if job.row == "dp":
        config.finalize_model_grads_func = finalize_model_grads
        model = DistributedDataParallel(
            config, DistributedDataParallelConfig(overlap_grad_reduce=True), model, disable_bucketing=False
        )
        config.no_sync_func = model.no_sync
    return model


def _answer_for_cuda() -> None:
    """The few calls that assume a GPU."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    for name in ("zeros", "ones", "tensor", "empty"):
        setattr(torch, name, partial(_on_cpu, getattr(torch, name)))
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()  # for dropout, of which there is none


def _on_cpu(make: Any, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("device") == "cuda":
        kwargs["device"] = "cpu"
    return make(*args, **kwargs)
