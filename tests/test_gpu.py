"""What only a GPU can show: the step through its fused kernels, against float64 and against torch's own bf16."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch
from network_hosts import free_port
from tiny_models import make_model, tiny_config
from train_cases import losses_of, make_case, stop_in

from megacoder.data.stream import Batch
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.model.places import Places
from megacoder.model.stage import Microbatch, Stage, forward_backward
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.attention import (
    DocumentMask,
    attention_backward,
    attention_forward,
    attention_reference,
    causal_mask,
)
from megacoder.ops.backends import OPS, backend, candidates
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.ops.fused_attention import FLASH
from megacoder.parallel import context
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.context import ContextParallel, context_attention_backward, context_attention_forward
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.world import World
from megacoder.train.engine import Engine
from megacoder.train.layout import LayoutRequest
from megacoder.train.loop import Interrupted, Trainer, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = {
    "all heads": {},
    "grouped": {"num_key_value_heads": 2},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "head_dim 64": {"head_dim": 64},
    "biases": {"num_key_value_heads": 2, "qkv_bias": True},
    "normed heads": {"num_key_value_heads": 2, "qk_norm": True},
}


shape_of = functools.partial(
    tiny_config, vocab_size=1000, hidden_size=512, intermediate_size=688, head_dim=128, max_position_embeddings=512,
    init_std=0.04, vocab_multiple=ModelConfig().vocab_multiple,
)  # fmt: skip


def batch_of(config):
    tokens = torch.randint(0, config.vocab_size, (3, 257), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[1, 4:90] = IGNORE_INDEX
    starts = torch.zeros(3, 256, dtype=torch.bool)
    for sequence, places in enumerate(([0, 1, 100], [0], [0, 128, 255])):
        starts[sequence, places] = True
    return tokens[:, :-1].cuda(), labels.cuda(), starts.cuda()


def built(config):
    return make_model(config).cuda()


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bf16_step_errs_at_most_twice_as_much_as_autograd_in_bf16(shape, packed):
    config = shape_of(**SHAPES[shape])
    tokens, labels, starts = batch_of(config)
    masks = {"starts_BS": starts} if packed else {}
    # All start from the weights that bf16 can hold.
    exact = built(config).bfloat16().double()
    expected = exact.loss(tokens, labels, **masks)
    expected.backward()
    rounded = built(config).bfloat16()
    rounded.loss(tokens, labels, **masks).backward()
    model = built(config)
    FlatParameters(model.named_parameters(), dtype=torch.bfloat16, device=torch.device("cuda"))
    loss = forward_backward(model, tokens, labels, **masks)

    assert loss.total.item() == pytest.approx(expected.item(), rel=2e-4)
    for (name, ours), theirs, true in zip(
        model.named_parameters(), rounded.parameters(), exact.parameters(), strict=True
    ):
        error, allowed = ((param.grad.double() - true.grad).norm().item() for param in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * true.grad.norm().item(), f"{name}: {error:.3e} against {allowed:.3e}"


def test_fp32_on_a_gpu_is_fp32_on_a_cpu():
    config = shape_of(num_key_value_heads=2)
    tokens, labels, starts = batch_of(config)
    grads, losses = [], []
    for device in ("cpu", "cuda"):
        model = make_model(config)
        flat = FlatParameters(model.named_parameters(), dtype=torch.float32, device=torch.device(device))
        loss = forward_backward(model, tokens.to(device), labels.to(device), starts_BS=starts.to(device))
        losses.append(loss.total.item())
        grads.append(flat.grad.double().cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (grads[1] - grads[0]).norm() <= 1e-4 * grads[0].norm()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_little_on_a_gpu(recompute):
    config = shape_of()
    tokens, labels, _ = batch_of(config)
    model = built(config)
    flat = FlatParameters(model.named_parameters(), dtype=torch.bfloat16, device=torch.device("cuda"))
    grads = []
    for kind in ("none", recompute):
        flat.grad.zero_()
        stage = dataclasses.replace(Stage.whole(model), recompute=kind)
        _, saved = stage.forward(None, Microbatch.of(tokens, labels))
        stage.backward(None, saved)
        grads.append(flat.grad.clone())
    assert (grads[0] - grads[1]).norm() <= 1e-3 * grads[0].norm()  # cuDNN's backward adds in any order


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_the_host_does_not_synchronize_within_a_step(packed):
    config = shape_of()
    tokens, labels, starts = (tensor.cpu() for tensor in batch_of(config))
    request = LayoutRequest(
        model=config, parallel=ParallelConfig(), seq_length=256, global_batch_size=3, micro_batch_size=1
    )
    layout, world = request.layout(1), World(0, 1, 0, torch.device("cuda", 0), None)
    engine = Engine(
        config, layout, Mesh(world, layout.dims, sequence_parallel=False), execution=ExecutionConfig(),
        bucket_elements=1 << 20, optimizer=AdamWConfig(), dtype=torch.bfloat16, seed=0,
    )  # fmt: skip
    batch = Batch(tokens=tokens, labels=labels, starts=starts if packed else None)
    engine.forward_backward(engine.microbatches(batch, 1))  # compiles what it needs
    microbatches = engine.microbatches(batch, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        part = engine.forward_backward(microbatches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert part.num_tokens == (labels != IGNORE_INDEX).sum()


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "flash4"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 128), (8, 2, 128), (4, 1, 64)])
@pytest.mark.parametrize("length", [128, 192, 1000])
def test_attention_backends_against_float64(name, heads, kv_heads, dim, length, asked):
    if name not in candidates("attention", "cuda", torch.bfloat16):
        pytest.skip(f"{name} is not here")
    asked(f"attention={name}")
    _compare(2, heads, kv_heads, dim, length, num_keys=length)
    if name in FLASH:
        assert torch.nn.attention.current_flash_attention_impl() == FLASH[name]


@pytest.mark.parametrize(("query_start", "unread"), [(0, 3), (64, 0), (500, 70)])
def test_attention_of_part_of_a_sequence_within_documents(query_start, unread):
    own = torch.tensor([0, 30, 64, 65, 300, 520])
    places = torch.arange(query_start, query_start + 200)
    first = torch.stack([own[torch.searchsorted(own, places, right=True) - 1], torch.zeros_like(places)])
    _compare(
        2, 4, 2, 128, 200, num_keys=query_start + 200 + unread, query_start=query_start,
        documents=DocumentMask(first.cuda(), query_start),
    )  # fmt: skip


def _compare(batch, heads, kv_heads, dim, length, *, num_keys, query_start=0, documents=None):
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(batch, length, heads, dim), (batch, num_keys, kv_heads, dim), (batch, num_keys, kv_heads, dim)]
    draws = [torch.randn(size, generator=generator, device="cuda").bfloat16().transpose(1, 2) for size in sizes]
    grad = torch.randn(sizes[0], generator=generator, device="cuda").bfloat16()
    first = None if documents is None else documents.first_keys_BS
    mask = causal_mask(torch.arange(query_start, query_start + length, device="cuda"), num_keys, first_keys_BS=first)
    exact, rounded = (_plain(tensors, grad, mask) for tensors in ([tensor.double() for tensor in draws], draws))
    masks = {"query_start": query_start, "documents": documents}
    out, lse = attention_forward(*draws, **masks)
    ours = [out.transpose(1, 2), *attention_backward(grad, *draws, out, lse, **masks)]
    _assert_as_exact_as(ours, exact, rounded)


def _plain(tensors, grad, mask):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attention_reference(*leaves, mask=mask)
    out.backward(grad.transpose(1, 2).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _assert_as_exact_as(ours, exact, rounded):
    for what, true, mine, theirs in zip(("out", "dq", "dk", "dv"), exact, ours, rounded, strict=True):
        error, allowed = ((tensor.double() - true).norm() / true.norm() for tensor in (mine, theirs))
        assert error <= 2 * allowed + 2e-3, f"{what}: {error:.2e} against {allowed:.2e}"


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_of_context_parallel_ranks_against_float64(batch, packed, monkeypatch):
    length, size, heads, kv_heads, dim = 512, 2, 4, 2, 128
    ranks_own = lambda grads, dtype, cp: lambda: tuple(grads.to(dtype))  # noqa: E731, without the sum over ranks
    monkeypatch.setattr(context, "_start_sum", ranks_own)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, length, number, dim, generator=generator, device="cuda").bfloat16()
        for number in (heads, kv_heads, kv_heads, heads)
    )
    starts = torch.zeros(batch, length, dtype=torch.bool)
    starts[:, [0, 100, 259]] = True
    for rank in range(size):
        cp = ContextParallel(rank=rank, size=size)
        places = Places.of((batch, length), cp, device=q.device, starts_BS=starts.cuda() if packed else None)
        own = cp.places(length).cuda()
        draws = q[:, own].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        first = torch.where(starts, torch.arange(length), 0).cummax(1)[0][:, own.cpu()].cuda() if packed else None
        mask = causal_mask(own, length, first_keys_BS=first)
        exact, rounded = (_plain(tensors, grad[:, own], mask) for tensors in ([t.double() for t in draws], draws))
        out, lse = context_attention_forward(*draws, cp, documents=places.documents)
        grad_q, wait = context_attention_backward(grad[:, own], *draws, out, lse, cp, documents=places.documents)
        _assert_as_exact_as([out.transpose(1, 2), grad_q, *wait()], exact, rounded)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("run"))


def train_losses(case, output, **changes):
    train(case.config(output, **changes))
    return losses_of(case.folder / output)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_run_on_a_gpu_is_the_run_on_a_cpu(case, packed):
    data = {"stream": {"document_masks": packed}}
    on_cpu = train_losses(case, f"cpu-{packed}", data=data)
    assert train_losses(case, f"gpu-{packed}", data=data, device="cuda") == pytest.approx(on_cpu, rel=1e-3)
    assert train_losses(case, f"bf16-{packed}", data=data, device="cuda", dtype="bfloat16") == pytest.approx(
        on_cpu, rel=0.05
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_from_a_graph_is_the_run_without(case, dtype):
    settings = {"device": "cuda", "dtype": dtype}
    without = train_losses(case, f"launched-{dtype}", **settings)
    graphed = train_losses(case, f"graphed-{dtype}", execution=ExecutionConfig(cuda_graph=True), **settings)
    assert graphed == pytest.approx(without, rel=1e-3)


def test_a_run_on_a_gpu_resumes(case):
    settings = {"device": "cuda", "dtype": "bfloat16"}
    whole = train_losses(case, "uninterrupted", **settings)
    trainer = Trainer(case.config("stopped", **settings), World(0, 1, 0, torch.device("cuda", 0), None))
    stop_in(trainer, 5)
    with pytest.raises(Interrupted, match="stopped at step 5 "):
        trainer.run()
    assert train_losses(case, "stopped", **settings) == pytest.approx(whole, rel=1e-3)


LAYOUTS = {
    "tp": {"tp": 2}, "tp, whole stream": {"tp": 2, "sequence_parallel": False}, "pp": {"pp": 2, "schedule": "zb-h1"},
    "cp": {"cp": 2}, "dp": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def over_nccl(case):
    """What two ranks say and log in each layout. They share the GPU, which NCCL allows to ranks of different hosts."""
    started = {}
    for number, (name, choices) in enumerate(LAYOUTS.items()):
        toml = case.toml(f"nccl-{number}", device="cuda", parallel=ParallelConfig(**choices))
        port = free_port()
        for rank in range(2):
            place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port,
                     "MASTER_ADDR": "localhost", "NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo"}  # fmt: skip
            started[name, rank] = subprocess.Popen(
                [sys.executable, "-m", "megacoder", "train", str(toml)],
                env={**os.environ, **{key: str(value) for key, value in place.items()}},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
    said = {key: process.communicate(timeout=200)[1] for key, process in started.items()}
    return {
        name: (
            [started[name, rank].returncode for rank in range(2)], said[name, 0] + said[name, 1],
            case.folder / f"nccl-{number}",
        )
        for number, name in enumerate(LAYOUTS)
    }  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_over_nccl_equal_one_process(name, case, over_nccl):
    codes, said, folder = over_nccl[name]
    assert codes == [0, 0], said
    alone = case.folder / "alone"
    if not alone.exists():
        train(case.config("alone", device="cuda"))
    assert losses_of(folder) == pytest.approx(losses_of(alone), rel=2e-5)


def test_every_op_has_a_kernel_here():
    sample = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    assert {op: backend(op, sample) for op in OPS} == {
        "rms_norm": "triton", "rope": "triton", "swiglu": "triton", "cross_entropy": "triton",
        "attention": "cudnn", "weight_grad": "cublas", "few_rows": "torch", "decode": "torch", "adamw": "cuda",
        "fp8_cast": "cuda", "fp8_product": "scaled_mm",
    }  # fmt: skip
