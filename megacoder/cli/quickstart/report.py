"""report.html: what the quickstart did, from the files that it left behind; no figure comes from anywhere else."""

import json
from typing import Any

import torch

from megacoder.cli.quickstart.options import Paths
from megacoder.core.config import load_toml
from megacoder.core.device import Machine
from megacoder.core.files import write_text
from megacoder.core.html import code, page, paragraph, section, tiles, value_table
from megacoder.corpus.accounts import CorpusReport, load_report
from megacoder.corpus.report import file_rows, language_rows
from megacoder.data.sidecar import Sidecar
from megacoder.train.config import RunConfig
from megacoder.train.metrics_log import read_metrics
from megacoder.train.report import loss_chart, speed_chart
from megacoder.version import __version__

__all__ = ["write_report"]


def write_report(paths: Paths, machine: Machine, *, nproc: int) -> None:
    """Writes one self-contained file."""
    config = load_toml(RunConfig, paths.run_config)
    metrics = read_metrics(paths.run / "metrics.jsonl")
    evaluation = json.loads(paths.evaluation.read_text(encoding="utf-8"))
    corpus = load_report(paths.corpus)
    lead = (
        f"megacoder {__version__}, torch {torch.__version__}, {machine.device_name}, {nproc} processes, "
        f"{config.dtype}, seed {config.seed}"
    )
    body = [
        _headline(config, metrics, evaluation),
        _quality(evaluation),
        _infills(evaluation),
        _training(config, metrics),
        _data(paths, corpus),
    ]
    write_text(paths.report, page("A code model from this machine's own sources", lead, body))


def _headline(config: RunConfig, metrics: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    speeds = sorted(row["tokens_per_second"] for row in metrics)
    return tiles(
        [
            ("parameters", f"{config.model.num_params / 1e6:.1f} M"),
            ("tokens trained on", f"{metrics[-1]['tokens'] / 1e6:.2f} M"),
            ("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"),
            ("held-out bits per byte", f"{evaluation['held_out']['model']:.3f}"),
            ("lines filled in exactly", f"{evaluation['infill']['model']['exact_match']:.1%}"),
        ]
    )


def _quality(evaluation: dict[str, Any]) -> str:
    held_out, infill = evaluation["held_out"], evaluation["infill"]
    better = held_out["model"] < held_out["xz"]
    verdict = (
        f"The model needs {abs(1 - held_out['model'] / held_out['xz']):.0%} {'fewer' if better else 'more'} bits than "
        f"xz -9 for repositories it has never seen ({held_out['num_bytes']:,} bytes, {held_out['num_documents']:,} "
        "documents)."
    )
    names = [("model", "model"), ("line above, repeated", "line_above"), ("most frequent line", "most_frequent_line")]
    rows = [
        [name, f"{infill[key]['exact_match']:.1%}", f"{infill[key]['edit_similarity']:.1%}"]
        for name, key in names
        if infill.get(key)
    ]
    difference = evaluation["largest_logit_difference"]
    compressors = (("model", "model"), ("xz -9", "xz"), ("unigram", "unigram"))
    return section(
        "On held-out repositories",
        paragraph(verdict),
        value_table(
            ["compressor", "bits per byte"],
            [[name, f"{held_out[key]:.4f}"] for name, key in compressors],
        ),
        value_table(
            ["filled in by", "exact match", "edit similarity"], rows,
            caption=f"single-line infilling, {infill['num_tasks']} lines of {infill['num_files']} files",
        ),
        paragraph(
            "transformers is not installed, so the export was not compared with it." if difference is None
            else f"Loaded by transformers, the export's logits differ from ours by at most {difference:.1e} in fp32."
        ),
    )  # fmt: skip


def _infills(evaluation: dict[str, Any]) -> str:
    parts = []
    for hole in evaluation["shown"]:
        before = "\n".join(hole["before"]) + "\n"
        after = "\n" + "\n".join(hole["after"])
        parts.append(paragraph(f"{hole['repo']}/{hole['path']}, line {hole['line']}; marked: filled in by the model"))
        parts.append(code(before, hole["completion"].rstrip("\n") or "(nothing)", after))
        parts.append(paragraph("the truth" + (", found exactly" if hole["exact_match"] else "") + ":"))
        parts.append(code(hole["truth"]))
    return section("Gaps in code it has never seen", *parts)


def _training(config: RunConfig, metrics: list[dict[str, Any]]) -> str:
    model = config.model
    order = ", suffix first" if config.data.stream.fim.suffix_first else ""
    shape = (
        f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, feed-forward {model.intermediate_size}, "
        f"{model.num_attention_heads} heads ({model.num_key_value_heads} key-value) of {model.head_dim}, vocabulary "
        f"{model.vocab_size:,}; {config.steps:,} steps of {config.global_batch_size} x "
        f"{config.data.stream.seq_length} tokens, AdamW at {config.schedule.peak_lr:g}, three stages, "
        f"fill-in-the-middle rate {config.data.stream.fim.rate:g}{order}. Training loss is that of the reordered "
        "documents; held-out loss is plain next-token prediction."
    )
    return section(
        "Training",
        paragraph(shape),
        loss_chart(metrics),
        speed_chart(metrics),
    )


def _data(paths: Paths, corpus: CorpusReport) -> str:
    accounts = corpus.accounts
    train, heldout = Sidecar.read(paths.train_data), Sidecar.read(paths.heldout_data)
    repositories = sorted(accounts.repositories.items(), key=lambda item: -item[1].kept.bytes)
    tokens = [
        [name, f"{part.documents:,}", f"{part.sequences:,}", f"{part.tokens:,}", f"{part.bytes / part.tokens:.2f}"]
        for name, part in (("training", train), ("held out", heldout))
        if part is not None
    ]
    return section(
        "The corpus",
        value_table(
            ["files", "number", "size"], file_rows(corpus), caption="what was kept, and what was dropped and why"
        ),
        value_table(["language", "size", "files", "share"], language_rows(corpus)),
        value_table(["part", "documents", "files", "tokens", "bytes per token"], tokens),
        value_table(
            ["repository", "files", "size", "part"],
            [
                [name, f"{row.kept.files:,}", row.kept.megabytes, "held out" if row.heldout.files else "training"]
                for name, row in repositories
                if row.kept.files
            ],
            caption="repositories, largest first",
        ),
    )
