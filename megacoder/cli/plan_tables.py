"""What `megacoder plan` prints about a model on a cluster, from the report that `--json` shows as it is."""

from collections.abc import Sequence
from typing import Any

from megacoder.core.console import table
from megacoder.model.presets import PRESETS
from megacoder.train.planning.scaling import Advice
from megacoder.train.planning.search import RECOMPUTES

__all__ = ["show_advice", "show_layouts"]


def show_layouts(report: dict[str, Any]) -> None:
    """Time and memory of the layouts that fit, why the others do not, and what is not counted."""
    rows, own = list(report["layouts"]), report["configured"]
    if own is not None and own["layout"] is not None and not any(row["as_configured"] for row in rows):
        rows.append(own["layout"])
        if own["fits"]:
            rows.sort(key=lambda row: row["step_seconds"])
    if rows:
        _print_times(report, rows)
        _print_memory(report, rows)
    if own is not None:
        mark = "As" if own["layout"] is None else "* as"
        print(f"{mark} configured in {report['model']}: {own['reason'] or _compared(own['layout'], report['layouts'])}")
    rejected = "; not the others:" if report["rejected"] else ""
    print(f"{report['fitting']:,} of {report['tried']:,} layouts and ways to run them fit{rejected}")
    for row in report["rejected"]:
        print(f"  {row['layouts']:>6,}  {row['reason']}; {row['example']}")
    for left_out in report["not_counted"]:
        print(f"Not counted: {left_out}")
    if report["advice"] is not None:
        advice = report["advice"]
        print(
            f"The scaling law of DeepSeek-LLM for {advice['tokens']:.3g} tokens: batch {advice['batch_sequences']:,} "
            f"sequences ({advice['batch_tokens'] / 1e6:.2f}M tokens), learning rate {advice['peak_lr']:.2e}, "
            f"{advice['steps']:,} steps"
        )


def show_advice(rows: dict[str, Advice]) -> None:
    """By preset."""
    table(
        "Batch and learning rate by the scaling law of DeepSeek-LLM, beside those of the published models",
        ["model", "sequences", "published", "learning rate", "published", "steps", "FLOPs"],
        [[name, f"{advice.batch_sequences:,}", f"{PRESETS[name].global_batch_size or '-'}",
          f"{advice.peak_lr:.2e}", "-" if PRESETS[name].peak_lr is None else f"{PRESETS[name].peak_lr:.1e}",
          f"{advice.steps:,}", f"{advice.compute:.2e}"] for name, advice in rows.items()],
    )  # fmt: skip


def _compared(own: dict[str, Any], layouts: Sequence[dict[str, Any]]) -> str:
    """The run's own layout with the fastest one found."""
    if not layouts:
        return "fits"
    if layouts[0]["as_configured"]:
        return "the fastest layout that was found"
    longer = own["step_seconds"] / layouts[0]["step_seconds"] - 1
    return f"a step takes {abs(longer):.1%} {'longer' if longer >= 0 else 'less'} than the fastest one found"


def _print_times(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    with_days = any(row["days"] is not None for row in rows)
    table(
        f"{report['model']} ({report['parameters']:,} parameters), {report['global_batch_size']:,} x "
        f"{report['seq_length']:,} tokens a step, on {report['devices']:,} x {report['device']} in {report['dtype']}",
        ["tp cp pp dp", "schedule", "micro", "recompute", "step s", "tokens/s", "MFU full", "causal",
         *(["days", "device-hours"] if with_days else [])],
        [[_axes(row), _schedule_name(row),
          str(row["micro_batch_size"]), row["recompute"], f"{row['step_seconds']:.4g}",
          f"{row['tokens_per_second']:,.0f}", f"{row['mfu_full']:.1%}", f"{row['mfu_causal']:.1%}",
          *([f"{row['days']:,.1f}", f"{row['device_hours']:,.0f}"] if with_days else [])]
         for row in rows],
    )  # fmt: skip


def _print_memory(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
    unit, name = (1e9, "GB") if any(row["memory"]["total"] >= 1e9 for row in rows) else (1e6, "MB")
    table(
        f"{name} on the most loaded rank, out of {report['memory_gb'] * 1e9 / unit:,.0f} without what is reserved; at "
        "the right, activations by recomputation",
        ["tp cp pp dp", *kinds, *RECOMPUTES],
        [[_axes(row), *(f"{row['memory'][kind] / unit:.1f}" for kind in kinds),
          *(f"{size / unit:.1f}" for size in row["memory"]["activations_by_recompute"].values())]
         for row in rows],
    )  # fmt: skip


def _axes(row: dict[str, Any]) -> str:
    sizes = " ".join(str(row[axis]) for axis in ("tp", "cp", "pp", "dp"))
    return f"{sizes} *" if row["as_configured"] else sizes


def _schedule_name(row: dict[str, Any]) -> str:
    if row["pp"] == 1:
        return "-"
    return f"interleaved x{row['chunks']}" if row["schedule"] == "interleaved" else str(row["schedule"])
