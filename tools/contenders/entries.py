"""Which contenders take part in which row of `bench_parallel.py`."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CONTENDERS", "OURS", "Contender", "Row"]

Row = Literal["tp", "pp", "dp"]

OURS = "megacoder"
"""How the names of ours begin."""

MASTER = "fp32 master"
"""bf16 weights; gradients, master weights and moments in fp32"""
PURE = "pure"
"""weights, gradients and moments in bf16"""
PURE_FP32_SUMS = "pure, fp32 sums"
"""weights and moments in bf16, gradients summed in fp32"""
AUTOCAST = "autocast"
"""weights, gradients and moments in fp32, products in bf16"""
TWO_STAGES, VEE = (6, 2), (1, 3, 4, 0)
"""Layers by stage, for those who do not place them by cost themselves: the head takes as long as five layers."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A module of this package with one of its variants, in one row."""

    row: Row
    name: str
    module: str
    variant: str = ""
    layers_per_stage: tuple[int, ...] = ()
    bf16: str = PURE
    """how it trains in bf16"""
    only_dtype: str | None = None
    backend: str = "gloo"
    needs: Literal["peers_python", "picotron"] | None = None
    """the option without which it cannot be tried"""


CONTENDERS = (
    Contender(row="tp", name=f"{OURS}", module="megacoder", bf16=MASTER),
    Contender(
        row="tp", name=f"{OURS}, sequence parallel", module="megacoder", variant="sequence parallel", bf16=MASTER
    ),
    Contender(row="tp", name="limit", module="limit", backend="apart", bf16=MASTER),
    Contender(row="tp", name="Megatron-Core", module="megatron_core", needs="peers_python"),
    Contender(row="tp", name="picotron", module="picotron", needs="picotron"),
    #
    Contender(row="pp", name=f"{OURS} zb-h1", module="megacoder", variant="zb-h1", bf16=MASTER),
    Contender(row="pp", name=f"{OURS} zbv", module="megacoder", variant="zbv", bf16=MASTER),
    Contender(row="pp", name=f"{OURS} 1f1b", module="megacoder", variant="1f1b", bf16=MASTER),
    Contender(row="pp", name="limit", module="limit", variant="zb-h1", backend="apart", bf16=MASTER),
    Contender(
        row="pp", name="torch pipelining 1F1B", module="torch_pipelining", variant="1f1b", layers_per_stage=TWO_STAGES
    ),
    Contender(
        row="pp", name="torch pipelining 1F1B, autocast", module="torch_pipelining", variant="1f1b autocast",
        layers_per_stage=TWO_STAGES, bf16=AUTOCAST, only_dtype="bfloat16",
    ),
    Contender(row="pp", name="torch pipelining ZBV", module="torch_pipelining", variant="zbv", layers_per_stage=VEE),
    Contender(
        row="pp", name="Megatron-Core", module="megatron_core", layers_per_stage=TWO_STAGES, needs="peers_python"
    ),
    Contender(row="pp", name="picotron", module="picotron", needs="picotron"),
    #
    Contender(row="dp", name=f"{OURS}", module="megacoder", bf16=MASTER),
    Contender(row="dp", name="limit", module="limit", backend="apart", bf16=MASTER),
    Contender(row="dp", name="torch DDP", module="torch_ddp"),
    Contender(
        row="dp", name="torch DDP, autocast", module="torch_ddp", variant="autocast", bf16=AUTOCAST,
        only_dtype="bfloat16",
    ),
    Contender(row="dp", name="Megatron-Core", module="megatron_core", needs="peers_python"),
    Contender(
        row="dp", name="picotron", module="picotron", needs="picotron", bf16=PURE_FP32_SUMS
    ),
)  # fmt: skip
"""Within a row, the first is what the others are compared with."""
