"""A run so far as one HTML file, from what is in the run's folder; also works while it trains."""

import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from megacoder.checkpoint.folders import CHECKPOINTS, step_folders
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.config import load_toml
from megacoder.core.errors import ConfigError, MegacoderError
from megacoder.core.files import write_text
from megacoder.core.html import Series, line_chart, page, paragraph, picture, section, tiles, value_table
from megacoder.data.readings import readings
from megacoder.parallel.schedules.draw import picture_of
from megacoder.parallel.schedules.simulate import Costs, simulate
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.metrics_log import DEVICE_TFLOPS, HELD_OUT_LOSS, METRICS, MFU, read_metrics
from megacoder.train.pace import DATA_SECONDS, SLOWEST_RATIO
from megacoder.train.scores import read_scores
from megacoder.train.utilization import CONVENTIONS
from megacoder.version import __version__

__all__ = ["loss_chart", "speed_chart", "write_run_report"]

Rows = list[dict[str, Any]]

_DRAWN_MICROBATCHES_PER_RANK = 4
"""A step may have thousands; the picture shows how it begins and ends."""
_LINES_PER_CHART = 4
"""Of held-out sets, and of groups of a benchmark: as many as have colors of their own and room for their names."""


def write_run_report(run: Path, path: Path) -> int:
    """Writes a report on the run in folder `run` to `path`; returns the last step logged there.

    Raises MegacoderError where no step has been logged there, ConfigError where `run` is a file.
    """
    if run.is_file():
        raise ConfigError(f"{run} is a file; expected the folder of a run, the `output` of its settings")
    config, rows = load_toml(RunConfig, run / RUN_TOML), read_metrics(run / METRICS)
    if not rows:
        raise MegacoderError(f"{run}: no step has been logged yet; train first")
    reader = CheckpointReader(run / CHECKPOINTS) if step_folders(run / CHECKPOINTS) else None
    lead = (
        f"megacoder {__version__}; step {rows[-1]['step']:,} of {config.steps:,}; "
        f"{config.model.num_params / 1e6:,.1f} M parameters, {config.model.rope_words}, {config.dtype}, "
        f"seed {config.seed}"
    )
    body = [
        _headline(rows),
        _learning(rows),
        *_scores(run),
        _machine(rows),
        _checkpoints(rows, reader),
        _data(config, reader),
    ]
    write_text(path, page(f"Run {run.resolve().name}", lead, [*body, _schedule(config, reader)]))
    return int(rows[-1]["step"])


def loss_chart(rows: Rows) -> str:
    """Training and held-out loss over steps."""
    lines = [_series("training", rows, "loss"), _series("held out", rows, HELD_OUT_LOSS)]
    return line_chart([line for line in lines if line.points], y_label="loss, nats per token")


def _held_out_sets(rows: Rows) -> list[str]:
    """Where a run has several held-out sets: a chart of their losses and what became of each of them."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{HELD_OUT_LOSS}/"))
    lines = [line for key in keys if (line := _series(key.partition("/")[2], rows, key)).points]
    table = []
    for line in lines:
        lowest = min(line.points, key=lambda point: point[1])
        shown = (line.points[0], lowest, line.points[-1])
        table.append([line.name, *(f"{loss:.3f} at {step:,}" for step, loss in shown)])
    columns = ["held-out set", "first loss, at step", "lowest", "last"]
    return [*_charts(lines, y_label="held-out loss"), value_table(columns, table)] if lines else []


def _charts(lines: list[Series], *, y_label: str) -> list[str]:
    """As many as the lines take."""
    return [
        line_chart(lines[first : first + _LINES_PER_CHART], y_label=y_label)
        for first in range(0, len(lines), _LINES_PER_CHART)
    ]


def _scores(run: Path) -> list[str]:
    """Where checkpoints have been scored: a chart of each score, a benchmark's groups in it, and what became of it."""
    charts: list[str] = []
    table = []
    for name, rows in read_scores(run).items():
        lines: dict[str, list[Series]] = defaultdict(list)
        for key in dict.fromkeys(key for row in rows for key in row["scores"]):
            score, _, group = key.partition("/")
            scored = [row for row in rows if row["scores"].get(key) is not None]
            points = [(row["step"], row["scores"][key]) for row in scored]
            if not points:  # none is finite
                continue
            ordered = sorted(points, key=lambda point: point[1])
            shown = (points[0], ordered[0], ordered[-1], points[-1])
            lines[score].append(Series(group or score, points))
            table.append([f"{name}, {key}", *(f"{value:.4f} at {step:,}" for step, value in shown)])
        for score, found in lines.items():
            charts += _charts(found, y_label=f"{name}, {score}")
    columns = ["score of checkpoints", "first, at step", "lowest", "highest", "last"]
    return [section("Scores", *charts, value_table(columns, table))] if charts else []


def speed_chart(rows: Rows) -> str:
    """Tokens per second over steps."""
    return _chart("tokens/s", rows, "tokens_per_second", "tokens per second")


def _series(name: str, rows: Rows, key: str) -> Series:
    """Points from the lines that have `key`; null stands for a number that is not finite."""
    return Series(name, [(row["step"], row[key]) for row in rows if row.get(key) is not None])


def _chart(name: str, rows: Rows, key: str, y_label: str) -> str:
    return line_chart([_series(name, rows, key)], y_label=y_label)


def _headline(rows: Rows) -> str:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    held_out = [row[HELD_OUT_LOSS] for row in rows if row.get(HELD_OUT_LOSS) is not None]
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    items = [
        ("tokens trained on", f"{rows[-1]['tokens'] / 1e6:,.2f} M"),
        ("loss", f"{losses[-1]:.3f}" if losses else "not finite"),
        *([("held-out loss", f"{held_out[-1]:.3f}")] if held_out else []),
        ("tokens/s, median", f"{speed:,.0f}"),
        *_utilization(rows),
        ("updates skipped", f"{rows[-1].get('skipped_updates', 0):,}"),
    ]
    return tiles(items)


def _utilization(rows: Rows) -> list[tuple[str, str]]:
    """Medians of what the lines say about the use of the devices, each with its convention."""
    labels = {f"{DEVICE_TFLOPS}/{name}": f"TFLOP/s per device, {name}, median" for name in CONVENTIONS}
    labels |= {f"{MFU}/{name}": f"MFU, {name}, median" for name in CONVENTIONS}
    if not any(key in row for row in rows for key in labels):
        labels = {"tflops": "TFLOP/s of all devices, causal attention, median"}
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in labels}
    return [
        (labels[key], f"{statistics.median(values):{'.1%' if key.startswith(MFU) else ',.3g'}}")
        for key, values in found.items()
        if values
    ]


def _learning(rows: Rows) -> str:
    before, left_out = 0, []
    for row in rows:
        now = row.get("skipped_updates", 0)
        if now > before:
            found = [f"{row[name]:.4g}" if row[name] is not None else "not finite" for name in ("loss", "grad_norm")]
            left_out.append([str(row["step"]), str(now - before), *found])
        before = now
    columns = ["logged at step", "updates skipped since the line before", "loss", "gradient norm"]
    return section(
        "Learning",
        loss_chart(rows),
        *_held_out_sets(rows),
        _chart("learning rate", rows, "lr", "learning rate"),
        _chart("gradient norm", rows, "grad_norm", "norm of the gradient before clipping"),
        value_table(columns, left_out, caption="the last 50")
        if (left_out := left_out[-50:])
        else paragraph("No update was skipped."),
    )


def _machine(rows: Rows) -> str:
    compared, waited = (any(name in row for row in rows) for name in (SLOWEST_RATIO, DATA_SECONDS))
    return section(
        "Speed and memory",
        speed_chart(rows),
        _chart("memory", rows, "memory_gib", "peak GiB of the first rank: tensors on a GPU, else its process"),
        *(
            [_chart("waiting for data", rows, DATA_SECONDS, "seconds of the rank that waited longest")]
            if waited
            else []
        ),
        *([_chart("slowest rank", rows, SLOWEST_RATIO, "slowest rank's own time / median")] if compared else []),
    )


def _checkpoints(rows: Rows, reader: CheckpointReader | None) -> str:
    waits = [row["checkpoint_seconds"] for row in rows if row.get("checkpoint_seconds")]
    newest = "There is none yet." if reader is None else f"The newest complete one is of step {reader.step:,}."
    held_up = f" Saving blocked training {len(waits):,} times, for {sum(waits):,.2f} s in total." if waits else ""
    parts = [paragraph(newest + held_up)]
    if waits:
        parts.append(_chart("checkpoints", rows, "checkpoint_seconds", "seconds that saving blocked training"))
    return section("Checkpoints", *parts)


def _data(config: RunConfig, reader: CheckpointReader | None) -> str:
    """What has been drawn from each dataset, according to the newest checkpoint."""
    title = "Data drawn so far"
    if reader is None:
        return section(title, paragraph("Known from the first checkpoint on."))
    state, prefixes = reader.state["data"], config.data.train
    first, length, order = state.get("first_window", 0), config.data.stream.seq_length, state["order"]
    windows = state["windows"] - first
    reads = readings(order, seq_length=length, num_windows=windows, first_window=first)
    if not reads:  # several datasets in Megatron's order, or conversations
        return section(title, paragraph(f"{windows:,} windows of {length:,} tokens."))
    weights = order.get("weights", [1.0])
    rows = [
        [str(prefix), f"{weight / sum(weights):.2%}", f"{read.share:.2%}" if windows else "",
         f"{read.windows * length:,}", f"{read.times:.3f}"]
        for prefix, weight, read in zip(prefixes, weights, reads, strict=True)
    ]  # fmt: skip
    caption = f"at the checkpoint of step {reader.step:,}: {windows:,} windows of {length:,} tokens"
    if first:
        caption += f", after {first:,} windows in the run that this one goes on from"
    return section(
        title,
        value_table(["dataset", "target share", "share drawn", "tokens drawn", "epochs"], rows, caption=caption),
    )


def _schedule(config: RunConfig, reader: CheckpointReader | None) -> str:
    """The ranks, and the timeline of the pipeline if there is one, with backwards twice as long as forwards."""
    title = "Layout and schedule"
    if reader is None:
        return section(title, paragraph("Known from the first checkpoint on."))
    sizes = {str(axis): int(size) for axis, size in reader.layout.items()}
    text = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) + f" on {math.prod(sizes.values()):,} ranks."
    pp = sizes["pp"]
    if pp == 1:
        return section(title, paragraph(text + " No pipeline, so no schedule to draw."))
    microbatches = config.global_batch_size // (config.micro_batch_size * sizes["dp"])
    drawn = min(microbatches, _DRAWN_MICROBATCHES_PER_RANK * pp)
    shorter = replace(
        config, parallel=replace(config.parallel, tp=sizes["tp"], cp=sizes["cp"], pp=pp, dp=sizes["dp"]),
        global_batch_size=drawn * config.micro_batch_size * sizes["dp"],
    )  # fmt: skip
    try:
        schedule = shorter.layout(math.prod(sizes.values())).schedule
    except ConfigError:
        return section(title, paragraph(text + " Settings have changed since then, so there is no schedule to draw."))
    share = 1 / schedule.num_chunks
    costs = Costs.uniform(schedule.stage_map.num_stages, forward=share, input_grad=share, weight_grad=share)
    more = f" The first {drawn} of {microbatches:,} microbatches of a step." if drawn < microbatches else ""
    drawing = picture(picture_of(simulate(schedule, costs)).svg(), describes=f"schedule {schedule.name} on {pp} ranks")
    return section(title, paragraph(text + more + " Simulated, with stages of equal time."), drawing)
