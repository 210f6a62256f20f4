"""Published throughputs, and the planner's prediction of each with shares fitted to all the others.

The shares that are fitted minimise the squares of log(predicted / published) plus a weak pull to the starting values,
without which a share that few rows depend on would diverge when those rows are excluded.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from megacoder.core.console import say, table
from megacoder.model.config import ModelConfig
from megacoder.parallel.dims import ParallelDims
from megacoder.train.planning.devices import DEVICES, Device, Shares
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.search import SearchSpace, search, variant_pipeline
from megacoder.train.planning.step_time import step_time

__all__ = ["ROWS", "Row", "check_published", "fit"]

FITTED = ("products", "fp8_products", "attention", "links")
"""The other shares stay where they start: the rows say little of them."""
START = Shares(products=0.6, fp8_products=0.45, attention=0.35, copies=0.85, links=0.7, hidden_exchange=0.7)
ROW_ERROR, PULL = 0.1, 0.5
"""Standard deviations that the fit takes for a row's error and for a share's distance from its start, of logarithms."""
MEDIAN_ALLOWED, LARGEST_ALLOWED = 0.10, 0.25


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published run."""

    name: str
    job: Job
    device: Device
    devices: int
    tokens_per_second: float
    """published, of one device"""
    space: SearchSpace
    """what is known of the layout"""
    variant: Variant | None = None
    """all of it, where all is known"""


def _model(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, vocab_size=vocab,
        max_position_embeddings=8192,
    )  # fmt: skip


def _megatron() -> list[Row]:
    """Its README: GPT models with a plain feed-forward of 4 D, as much work as a gated one of 8/3 D."""
    published = [  # name, heads, hidden, layers, tp, pp, batch, TFLOP/s per device with attention in full
        ("1.7B", 16, 2048, 24, 1, 1, 192, 408.8), ("7.1B", 32, 4096, 30, 2, 1, 192, 465.9),
        ("16B", 48, 6144, 32, 4, 1, 192, 489.1), ("32B", 56, 7168, 48, 8, 1, 192, 459.6),
        ("70B", 64, 8192, 84, 8, 2, 384, 419.7), ("119B", 80, 10240, 92, 8, 4, 768, 420.5),
        ("177B", 96, 12288, 96, 8, 6, 1152, 432.8), ("314B", 128, 16384, 96, 8, 8, 1536, 474.4),
        ("462B", 144, 18432, 112, 8, 16, 3072, 459.9),
    ]  # fmt: skip
    rows = []
    for name, heads, hidden, layers, tp, pp, batch, tflops in published:
        model = _model(hidden, round(hidden * 8 / 3 / 64) * 64, layers, heads, heads, 131072)
        dims = ParallelDims(tp=tp, pp=pp, dp=48)
        rows.append(
            Row(
                name=f"Megatron-Core {name}",
                job=Job(model=model, seq_length=4096, global_batch_size=batch),
                device=DEVICES["h100"],
                devices=dims.world_size,
                tokens_per_second=tflops * 1e12 / model.training_flops_per_token(4096, causal=False),
                space=SearchSpace(dims=dims, schedules=("1f1b", "interleaved"), overlaps_exchange=True),
            )
        )
    return rows


def _torchtitan() -> list[Row]:
    """Its benchmarks folder: boards of 500 W, whose peak it puts between SXM (989) and NVL (835), 2.4 TB/s, full
    recomputation; pipelines of one microbatch for each rank, the default of that version."""
    board = replace(
        DEVICES["h100"], name="h100 500 W", matrix_tflops=912.0, fp8_tflops=1824.0, memory_gb_per_s=2400.0,
        memory_gb=103.0,
    )  # fmt: skip
    llama70, llama405 = _model(8192, 28672, 80, 64, 8, 128256), _model(16384, 53248, 126, 128, 8, 128256)
    rows = []
    for name, fp8, overlaps, tokens in (
        ("70B", False, False, 597.3), ("70B async", False, True, 652.4), ("70B fp8", True, False, 809.8),
        ("70B fp8 async", True, True, 942.4), ("70B fp8 (2024)", True, False, 829.0),
        ("70B fp8 async (2024)", True, True, 876.0),
    ):  # fmt: skip
        variant = Variant(
            dims=ParallelDims(tp=8, dp=32), micro_batch_size=16, recompute="full", fp8=fp8, overlaps_exchange=overlaps
        )
        job = Job(model=llama70, seq_length=8192, global_batch_size=512)
        rows.append(_whole(f"torchtitan {name}", job, board, variant, tokens))
    for name, schedule, chunks, tokens in (("1f1b", "1f1b", 1, 100.0), ("interleaved", "interleaved", 2, 128.0)):
        variant = Variant(
            dims=ParallelDims(tp=8, pp=8, dp=8), schedule=schedule, chunks=chunks, micro_batch_size=4,
            recompute="full", fp8=True, overlaps_exchange=True,
        )  # fmt: skip
        job = Job(model=llama405, seq_length=8192, global_batch_size=256)
        rows.append(_whole(f"torchtitan 405B fp8 {name}", job, board, variant, tokens))
    return rows


def _whole(name: str, job: Job, device: Device, variant: Variant, tokens: float) -> Row:
    return Row(
        name=name, job=job, device=device, devices=variant.dims.world_size, tokens_per_second=tokens,
        space=SearchSpace(), variant=variant,
    )  # fmt: skip


def _deepseek() -> list[Row]:
    """DeepSeek-LLM 67B at 300.6K device-hours a trillion tokens (arXiv:2405.04434, 3.1.3); its number of H800s is
    published nowhere, and taken to be 1,024. LLaMA-13B of Fire-Flyer (arXiv:2408.14158): PCIe boards of 40 GB, one
    200 Gb/s adapter a node, whose eight boards hold the same stage of eight replicas."""
    rows = [
        Row(
            name="DeepSeek-LLM 67B",
            job=Job(
                model=_model(8192, 22016, 95, 64, 8, 102400), seq_length=4096, global_batch_size=4608
            ),
            device=DEVICES["h800"], devices=1024, tokens_per_second=1e12 / (300.6e3 * 3600),
            space=SearchSpace(schedules=("1f1b",)),
        )
    ]  # fmt: skip
    pcie = replace(
        DEVICES["a100"], name="a100 pcie", memory_gb=42.9, reserved_gb=2.0, memory_gb_per_s=1555.0,
        node_gb_per_s=25.0, network_gb_per_s=25.0,
    )  # fmt: skip
    llama13 = _model(5120, 13824, 40, 40, 40, 32000)
    for devices, seconds in ((64, 64.118), (256, 17.448), (512, 9.717)):
        rows.append(
            Row(
                name=f"Fire-Flyer 13B on {devices}",
                job=Job(model=llama13, seq_length=2048, global_batch_size=4096),
                device=pcie,
                devices=devices,
                tokens_per_second=4096 * 2048 / seconds / devices,
                space=SearchSpace(dims=ParallelDims(pp=4, dp=devices // 4), schedules=("1f1b",), stage_per_node=True),
            )
        )
    return rows


ROWS = [*_megatron(), *_torchtitan(), *_deepseek()]
"""Sources: Megatron-LM's README (core r0.8), torchtitan's benchmarks, arXiv:2405.04434, arXiv:2408.14158."""


def chosen_variant(row: Row) -> Variant:
    """What is published, and for the rest what is best by the shares that the fit starts from."""
    if row.variant is not None:
        return row.variant
    found = search(row.job, row.device, START, num_devices=row.devices, space=row.space)
    return found.fits[0].variant


@cache  # all fits begin at the same place
def predict(row: Row, variant: Variant, shares: Shares) -> float:
    """Tokens a second of one device."""
    seconds = step_time(row.job, variant, variant_pipeline(row.job, variant), row.device, shares).total
    return row.job.tokens_per_step / seconds / row.devices


def fit(rows: Sequence[tuple[Row, Variant]]) -> Shares:
    """The shares that `rows` say; Gauss-Newton on logarithms."""
    start = np.log([getattr(START, name) for name in FITTED])
    at = start.copy()

    def shares(logs: np.ndarray) -> Shares:
        return replace(START, **dict(zip(FITTED, np.minimum(np.exp(logs), 0.95).tolist(), strict=True)))

    def errors(logs: np.ndarray) -> np.ndarray:
        said = [predict(row, variant, shares(logs)) / row.tokens_per_second for row, variant in rows]
        return np.concatenate([np.log(said) / ROW_ERROR, (logs - start) / PULL])

    for _ in range(2):  # the logarithms are nearly linear in each other
        here = errors(at)
        steps = np.eye(len(FITTED)) * 0.02
        slopes = np.stack([(errors(at + step) - here) / 0.02 for step in steps], axis=1)
        at = at - np.linalg.lstsq(slopes, here, rcond=None)[0]
    return shares(at)


def check_published(*, quiet: bool) -> dict[str, Any]:
    """Every row by shares of all other rows, and of all other sources; prints a table unless `quiet`."""
    chosen = [(row, chosen_variant(row)) for row in ROWS]
    by_source: dict[str, Shares] = {}
    results: list[dict[str, Any]] = []
    for place, (row, variant) in enumerate(chosen):
        source = row.name.split()[0]
        if source not in by_source:
            by_source[source] = fit([entry for entry in chosen if entry[0].name.split()[0] != source])
        others = fit(chosen[:place] + chosen[place + 1 :])
        said, said_by_sources = (predict(row, variant, shares) for shares in (others, by_source[source]))
        results.append(
            {
                "row": row.name, "devices": row.devices, "device": row.device.name, "layout": str(variant),
                "published": row.tokens_per_second, "predicted": said, "error": said / row.tokens_per_second - 1,
                "error_without_its_source": said_by_sources / row.tokens_per_second - 1,
                "shares": {name: getattr(others, name) for name in FITTED},
            }
        )  # fmt: skip
        if not quiet:
            say(f"{row.name}: {results[-1]['error']:+.1%}")
    sizes = [abs(row["error"]) for row in results]
    summary = {
        "rows": results, "fit_of_all_rows": asdict(fit(chosen)),
        "median_error": median(sizes), "largest_error": max(sizes),
        "median_error_without_its_source": median(abs(row["error_without_its_source"]) for row in results),
        "largest_error_without_its_source": max(abs(row["error_without_its_source"]) for row in results),
        "holds": median(sizes) <= MEDIAN_ALLOWED and max(sizes) <= LARGEST_ALLOWED,
    }  # fmt: skip
    if not quiet:
        _print(summary)
    return summary


def _print(summary: dict[str, Any]) -> None:
    table(
        "Tokens a second and device: each row predicted by shares fitted to all rows but itself",
        ["row", "devices", "layout", "published", "predicted", "error", "without its source"],
        [
            [
                row["row"], f"{row['devices']:,}", row["layout"], f"{row['published']:,.0f}",
                f"{row['predicted']:,.0f}", f"{row['error']:+.1%}", f"{row['error_without_its_source']:+.1%}",
            ]
            for row in summary["rows"]
        ],
    )  # fmt: skip
    print(
        f"median error {summary['median_error']:.1%} (at most {MEDIAN_ALLOWED:.0%}), largest "
        f"{summary['largest_error']:.1%} (at most {LARGEST_ALLOWED:.0%}); with no row of the same source seen: "
        f"{summary['median_error_without_its_source']:.1%} and {summary['largest_error_without_its_source']:.1%}"
    )
    print("shares fitted to all rows: " + ", ".join(f"{k} {v:.3f}" for k, v in summary["fit_of_all_rows"].items()))
