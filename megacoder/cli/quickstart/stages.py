"""The stages, in order, each skipped when its output is there already.

Every stage is a command of its own (`corpus build`, `tokenizer train`, `preprocess`, `train`, `checkpoint export`,
`eval`) and writes its output whole or not at all, so that after Ctrl-C or a crash the same command goes on. The options
of a folder are fixed by its first run.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.cli.corpus_report import print_report
from megacoder.cli.eval_infill import print_summary
from megacoder.cli.quickstart.options import Places, QuickstartOptions
from megacoder.cli.quickstart.recipe import choose_recipe, run_config, seconds_per_step, steps_within
from megacoder.cli.quickstart.report import write_report
from megacoder.core.config import check_same, load_toml, parse_args, to_toml
from megacoder.core.console import say, table
from megacoder.core.device import Machine, probe
from megacoder.core.files import write_json, write_text
from megacoder.corpus.accounts import CorpusReport
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.data.indexed import IndexedDataset
from megacoder.data.preprocess import PreprocessConfig, preprocess
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import TrainTokenizerConfig, train_from_files
from megacoder.evaluate.bits_per_byte import HeldOutScore, measure_bits_per_byte, training_token_counts
from megacoder.evaluate.held_out import read_source_files, sample_texts
from megacoder.evaluate.infill import (
    InfillResult,
    InfillSummary,
    choose_tasks,
    fill_lines,
    most_frequent_line,
    summarise,
)
from megacoder.evaluate.transformers_check import largest_logit_difference
from megacoder.model.huggingface import export_model, import_with_tokenizer
from megacoder.model.transformer import Transformer
from megacoder.train.config import RunConfig
from megacoder.train.launch import launch_workers
from megacoder.train.run_folder import load_weights

__all__ = ["main", "run_quickstart"]

NUM_INFILL_TASKS = 200
"""Held-out lines that the model is asked for."""
SHOWN_INFILLS = 3


def main(argv: Sequence[str]) -> None:
    """Runs or resumes every stage; ends with three infilled holes and the place of the report."""
    run_quickstart(parse_args(QuickstartOptions, argv, prog="megacoder quickstart"))


def run_quickstart(options: QuickstartOptions) -> None:
    """See `main`; the Python entry."""
    places, machine = Places(options.out), probe()
    claim(places, options)
    say(f"{machine.device_name}: {machine.num_devices} x {machine.device_type}, {machine.num_cores} cores")

    corpus = _stage("1/7 repositories and corpus", lambda: make_corpus(options, places))
    print_report(corpus, max_repositories=8)
    _stage("2/7 tokenizer", lambda: make_tokenizer(options, places))
    _stage("3/7 tokens", lambda: make_tokens(options, places))
    nproc = options.nproc or (machine.num_devices if machine.device_type == "cuda" else 2)
    config = _stage("4/7 recipe", lambda: make_run_config(options, places, machine, nproc))
    _stage("5/7 training", lambda: make_training(places, config, nproc))
    _stage("6/7 export", lambda: make_export(places, config))
    evaluation = _stage("7/7 evaluation", lambda: make_evaluation(places, config))
    write_report(places, machine, nproc=nproc)
    _show(evaluation, places)


def claim(places: Places, options: QuickstartOptions) -> None:
    """Fixes the options of a new folder; ConfigError where it was begun with others."""
    if places.options.exists():
        old = load_toml(QuickstartOptions, places.options)
        check_same(old, options, where=str(places.options), free={"out"}, advice="choose another --out")
    else:
        write_text(places.options, to_toml(options))


def make_corpus(options: QuickstartOptions, places: Places) -> CorpusReport:
    """Filtered, deduplicated, ordered Python documents."""
    limit = int(options.max_repo_megabytes * 1e6)
    # Without --input the sources are installed Python packages; a user's folder may hold any language.
    languages = () if options.input else ("Python",)
    return build_corpus(
        CorpusConfig(
            out=places.corpus, input=options.input, languages=languages, max_repo_bytes=limit, drop_generated=True
        )
    )


def make_tokenizer(options: QuickstartOptions, places: Places) -> None:
    """A BPE of the training documents."""
    if not (places.tokenizer / "tokenizer.json").exists():
        train_from_files(
            TrainTokenizerConfig(
                input=(places.corpus / "train",), output=places.tokenizer, vocab_size=options.vocab_size, sample_mb=24
            )
        )


def make_tokens(options: QuickstartOptions, places: Places) -> None:
    """Indexed binaries of both parts."""
    for part, prefix in (("train", places.train_data), ("heldout", places.heldout_data)):
        preprocess(
            PreprocessConfig(
                input=(places.corpus / part,), tokenizer=places.tokenizer, output=prefix, document_key="sample"
            )
        )


def make_run_config(options: QuickstartOptions, places: Places, machine: Machine, nproc: int) -> RunConfig:
    """run.toml, made once: with --steps as given, or as many as fit into --minutes on this machine."""
    if places.run_config.exists():
        return load_toml(RunConfig, places.run_config)
    recipe = choose_recipe(machine, options.minutes)
    config = run_config(
        recipe, machine, steps=1, vocab_size=Tokenizer.load(places.tokenizer).vocab_size, output=places.run,
        train=places.train_data, valid=places.heldout_data, tokenizer=places.tokenizer, seed=options.seed,
    )  # fmt: skip
    config.check_ranks(nproc)
    steps = options.steps or steps_within(options.minutes, seconds_per_step(config, machine, nproc=nproc))
    config = recipe.with_steps(config, steps)
    write_text(places.run_config, to_toml(config))
    say(
        f"{config.model.num_params / 1e6:.1f}M parameters in {config.dtype}, {steps:,} steps of "
        f"{config.global_batch_size} x {config.data.stream.seq_length} tokens on {nproc} processes"
    )
    return config
