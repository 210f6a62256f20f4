"""The paper's ablation of fill-in-the-middle (arXiv:2401.14196, figure 3): what infilling costs completion.

Five models of one shape on the same tokens in the same order, which differ in how files are shown: as they are (0%),
half or all of them with the middle last (PSM), half with the suffix first (SPM), half with masked spans (MSP). Drawn
side by side, at every checkpoint: held-out loss of plain completion, and lines filled in exactly.

    make quickstart                                                # leaves corpus, tokenizer and data
    python examples/fim_ablation/run.py                            # a few CPU hours
    python examples/fim_ablation/run.py --base examples/pretrain_1.3b.toml --steps 50000 --nproc 8   # on GPUs

It may be stopped at any time: started again, it resumes the runs.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megacoder.checkpoint.folders import CHECKPOINTS, step_folders
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.config import load_toml, parse_args, to_toml
from megacoder.core.console import say, table
from megacoder.core.device import probe
from megacoder.core.errors import ConfigError, MegacoderError
from megacoder.core.files import write_text
from megacoder.core.html import Series, line_chart, page, paragraph, section, value_table
from megacoder.data.fim import FimConfig
from megacoder.data.tokenizer import Tokenizer
from megacoder.evaluate.held_out import read_source_files
from megacoder.evaluate.infill import choose_tasks, fill_lines, summarize
from megacoder.model.transformer import Transformer
from megacoder.train.config import RunConfig
from megacoder.train.fragments import load_weights
from megacoder.train.metrics_log import read_metrics

VARIANTS: dict[str, FimConfig] = {
    "0%": FimConfig(rate=0.0),
    "50% PSM": FimConfig(rate=0.5),
    "100% PSM": FimConfig(rate=1.0),
    "50% SPM": FimConfig(rate=0.5, spm_rate=1.0),
    "50% MSP": FimConfig(rate=0.5, msp_rate=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Trains and compares models that differ in fill-in-the-middle alone."""

    base: Path = Path("examples/pretrain_13m.toml")
    """settings of all runs, except for `data.stream.fim`"""
    out: Path = Path("fim_ablation")
    """folder for the runs, results.json and report.html"""
    held_out: Path = Path("quickstart/corpus/heldout")
    """held-out files of `megacoder corpus build`, whose lines are filled in"""
    steps: int | None = None
    """training steps of each model; if unset, those of `base`"""
    points: int = 4
    """checkpoints at which infilling is measured, the last step among them"""
    num_tasks: int = 200
    """lines to fill in"""
    nproc: int = 1
    """ranks of each run"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """variants to train"""

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in VARIANTS:
                raise ConfigError(f"--variants {name!r}: expected some of {', '.join(map(repr, VARIANTS))}")
        if self.points < 1 or self.num_tasks < 1:
            raise ConfigError(f"--points {self.points}, --num-tasks {self.num_tasks}: must be at least 1 each")


def main() -> None:
    options = parse_args(Options, None, prog="examples/fim_ablation/run.py")
    base = load_toml(RunConfig, options.base)
    if not base.data.valid:
        raise ConfigError(f"{options.base}: sets no data.valid, on which the completion loss is measured")
    configs = {name: variant_config(base, name, options) for name in options.variants}
    results = {}
    for name, config in configs.items():
        say(f"{name}: {config.output}")
        _train(config, options)
        results[name] = measure(config, options)
    write_text(options.out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(options.out / "report.html", report(results, options))
    table(
        "Held-out completion loss (nats a token) and lines filled in exactly, at the end",
        ["", "completion loss", "exact match", "edit similarity"],
        [[name, f"{row['loss'][-1][1]:.4f}", *(f"{value:.1%}" for value in row["infill"][-1][1:])]
         for name, row in results.items()],
    )  # fmt: skip
    say(f"report: {options.out / 'report.html'}")


def variant_config(base: RunConfig, name: str, options: Options) -> RunConfig:
    """`base` with the variant's objective; parts of files stay as long as they were."""
    fim = replace(VARIANTS[name], context_tokens=base.data.stream.fim.context_tokens)
    steps = options.steps or base.steps
    every = max(1, steps // options.points)
    return replace(
        base, output=options.out / name.replace("%", "").replace(" ", "-").lower(), steps=steps,
        checkpoint_every=every, eval_every=max(1, every // 4), checkpoint=replace(base.checkpoint, keep_every=every),
        data=replace(base.data, fim_rates=(), stream=replace(base.data.stream, fim=fim)),
    )  # fmt: skip


def measure(config: RunConfig, options: Options) -> dict[str, list[list[float]]]:
    """`loss`: [step, held-out loss]; `infill`: [step, exact match, edit similarity] of every checkpoint."""
    rows = read_metrics(config.output / "metrics.jsonl")
    tokenizer = Tokenizer.load(config.data.tokenizer)
    tasks = choose_tasks(read_source_files([options.held_out]), num_tasks=options.num_tasks)
    fim, infill = config.data.stream.fim, []
    for step, folder in step_folders(config.output / CHECKPOINTS):
        model = Transformer(config.model).to(probe().device_type, torch.float32)
        load_weights(model, CheckpointReader(folder))
        scores = summarize(
            fill_lines(model, tokenizer, tasks, max_prompt_tokens=fim.context_tokens, spm=fim.suffix_first)
        ).model  # fmt: skip
        infill.append([step, scores.exact_match, scores.edit_similarity])
    return {
        "loss": [[row["step"], row["held_out_loss"]] for row in rows if "held_out_loss" in row],
        "infill": sorted(infill),
    }


def report(results: dict[str, dict[str, list[list[float]]]], options: Options) -> str:
    """One page: both curves, and the figures under them."""
    losses = [Series(name, [(x, y) for x, y in row["loss"]]) for name, row in results.items()]
    matches = [Series(name, [(step, 100 * match) for step, match, _ in row["infill"]]) for name, row in results.items()]
    rows = [
        [name, f"{row['loss'][-1][1]:.4f}", *(f"{value:.1%}" for value in row["infill"][-1][1:])]
        for name, row in results.items()
    ]
    return page(
        "Fill-in-the-middle, ablated",
        f"{len(results)} models that differ in how files are shown to them, and in nothing else.",
        [
            section("Completion", line_chart(losses, y_label="held-out loss, nats a token")),
            section("Infilling", line_chart(matches, y_label="lines filled in exactly, %"),
                    paragraph(f"{options.num_tasks} lines of held-out files, in PSM order, greedy.")),
            section("At the end", value_table(["", "completion loss", "exact match", "edit similarity"], rows)),
        ],
    )  # fmt: skip


def _train(config: RunConfig, options: Options) -> None:
    path = options.out / f"{config.output.name}.toml"
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(path, to_toml(config))
    command = [sys.executable, "-m", "megacoder", "train", str(path)]
    if options.nproc > 1:
        command += ["--nproc", str(options.nproc)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} failed with exit code {done.returncode}; its messages are above")


if __name__ == "__main__":
    try:
        main()
    except MegacoderError as error:
        raise SystemExit(f"fim_ablation: {error}") from None
