"""The stages, in order, each skipped when its output is there already.

Every stage is a command of its own (`corpus build`, `tokenizer train`, `preprocess`, `train`, `checkpoint export`,
`eval`) and writes its output completely or not at all, so that the same command resumes after Ctrl-C or a crash. The
options of a folder are fixed by its first run.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from megacoder.checkpoint.folders import CHECKPOINTS, step_folders
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.cli.corpus_report import print_report
from megacoder.cli.eval_infill import print_summary
from megacoder.cli.eval_perplexity import print_score
from megacoder.cli.quickstart.options import Paths, QuickstartOptions
from megacoder.cli.quickstart.recipe import choose_recipe, run_config, seconds_per_step, steps_within
from megacoder.cli.quickstart.report import write_report
from megacoder.core.config import check_same, from_dict, load_toml, parse_args, to_toml
from megacoder.core.console import say
from megacoder.core.device import Machine, faster_dtype, probe
from megacoder.core.errors import CorpusError
from megacoder.core.files import exclusive, making_dir, remove_stale_temporaries, write_json, write_text
from megacoder.corpus.accounts import REPORT_NAME, CorpusReport, load_report
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.samples import SampleConfig
from megacoder.corpus.split import SplitConfig
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
    summarize,
)
from megacoder.evaluate.transformers_check import largest_logit_difference
from megacoder.model.huggingface import export_model, import_model, import_with_tokenizer
from megacoder.model.transformer import Transformer
from megacoder.train.config import RunConfig
from megacoder.train.fragments import load_weights
from megacoder.train.launch import launch_workers

__all__ = ["main", "run_quickstart"]

HELD_OUT_BYTES = 1_000_000
"""Enough for a stable figure, little enough to score in half a minute."""
NUM_INFILL_TASKS = 200
"""Held-out lines that the model is to fill in."""
SHOWN_INFILLS = 3


def main(argv: Sequence[str]) -> None:
    """Runs or resumes every stage; ends with three filled gaps and the path of the report."""
    run_quickstart(parse_args(QuickstartOptions, argv, prog="megacoder quickstart"))


def run_quickstart(options: QuickstartOptions) -> None:
    """See `main`; the Python entry."""
    with making_dir(options.out), exclusive(options.out, what="quickstart"):
        _run_stages(options, Paths(options.out), probe())


def _run_stages(options: QuickstartOptions, paths: Paths, machine: Machine) -> None:
    check_options(paths, options)
    remove_stale_temporaries(paths.root)
    say(f"{machine.device_name}: {machine.num_devices} x {machine.device_type}, {machine.num_cores} cores")

    corpus = _stage("1/7 repositories and corpus", lambda: make_corpus(options, paths))
    if not paths.options.exists():  # only now: after a failed start the options may change
        write_text(paths.options, to_toml(options))
    print_report(corpus, max_repositories=8)
    _stage("2/7 tokenizer", lambda: make_tokenizer(options, paths))
    _stage("3/7 tokens", lambda: make_tokens(options, paths))
    nproc = options.nproc or (machine.num_devices if machine.device_type == "cuda" else 2)
    config = _stage("4/7 recipe", lambda: make_run_config(options, paths, machine, nproc))
    _stage("5/7 training", lambda: make_training(paths, config, nproc))
    _stage("6/7 export", lambda: make_export(paths, config))
    evaluation = _stage("7/7 evaluation", lambda: make_evaluation(paths, config))
    write_report(paths, machine, nproc=nproc)
    _show(evaluation, paths, config)


def check_options(paths: Paths, options: QuickstartOptions) -> None:
    """ConfigError if the folder was begun with other options."""
    if paths.options.exists():
        old = load_toml(QuickstartOptions, paths.options)
        check_same(old, options, where=str(paths.options), free={"out"}, advice="choose another --out")


def make_corpus(options: QuickstartOptions, paths: Paths) -> CorpusReport:
    """Filtered, deduplicated, ordered documents.

    Once the stages after it have begun the corpus stays as it is, though packages on the machine may come and go.
    """
    if paths.options.exists() and (paths.corpus / REPORT_NAME).exists():
        return load_report(paths.corpus)
    limit = int(options.max_repo_megabytes * 1e6)
    # Without --input the sources are installed Python packages; a user's folder may hold any language.
    languages = () if options.input else ("Python",)
    config = CorpusConfig(
        out=paths.corpus, input=options.input, languages=languages, max_repo_bytes=limit, drop_generated=True,
        samples=SampleConfig(oversize="cut"), heldout=SplitConfig(max_bytes=HELD_OUT_BYTES),
    )  # fmt: skip
    report = build_corpus(config)
    if report.accounts.heldout.files == 0:
        raise CorpusError(
            f"{paths.corpus}: too little to hold anything out; give more with --input, or remove {paths.root}"
        )
    choose_tasks(read_source_files([paths.corpus / "heldout"]), num_tasks=1)  # raises if there is no line to fill in
    return report


def make_tokenizer(options: QuickstartOptions, paths: Paths) -> None:
    """A BPE of the training documents."""
    if not (paths.tokenizer / "tokenizer.json").exists():
        train_from_files(
            TrainTokenizerConfig(
                input=(paths.corpus / "train",), output=paths.tokenizer, vocab_size=options.vocab_size, sample_mb=24
            )
        )


def make_tokens(options: QuickstartOptions, paths: Paths) -> None:
    """Indexed binaries of both parts."""
    for part, prefix in (("train", paths.train_data), ("heldout", paths.heldout_data)):
        preprocess(
            PreprocessConfig(
                input=(paths.corpus / part,), tokenizer=paths.tokenizer, output=prefix, document_key="sample"
            )
        )


def make_run_config(options: QuickstartOptions, paths: Paths, machine: Machine, nproc: int) -> RunConfig:
    """run.toml, made once: with --steps as given, or as many as fit into --minutes on this machine."""
    if paths.run_config.exists():
        return load_toml(RunConfig, paths.run_config)
    with_steps = partial(
        run_config, choose_recipe(machine, options.minutes), paths,
        nproc=nproc, dtype=faster_dtype(machine), vocab_size=Tokenizer.load(paths.tokenizer).vocab_size,
        seed=options.seed,
    )  # fmt: skip
    steps = options.steps
    if steps is None:
        steps = steps_within(options.minutes, seconds_per_step(with_steps(steps=1), machine, nproc=nproc))
    config = with_steps(steps=steps)
    write_text(paths.run_config, to_toml(config))
    say(
        f"{config.model.num_params / 1e6:.1f}M parameters in {config.dtype}, {steps:,} steps of "
        f"{config.global_batch_size} x {config.data.stream.seq_length} tokens on {nproc} processes"
    )
    return config


def make_training(paths: Paths, config: RunConfig, nproc: int) -> None:
    """The run, on `nproc` processes that torchrun's launcher starts."""
    if _trained_steps(paths) < config.steps:
        launch_workers(["train", str(paths.run_config)], nproc=nproc)


def make_export(paths: Paths, config: RunConfig) -> None:
    """The last checkpoint as a Hugging Face folder in fp32."""
    if not (paths.model / "config.json").exists():
        model = Transformer(config.model)
        load_weights(model, CheckpointReader(paths.run / CHECKPOINTS))
        export_model(model, paths.model, tokenizer_folder=paths.tokenizer)


def make_evaluation(paths: Paths, config: RunConfig) -> dict[str, Any]:
    """Scores of the exported model; everything that the report says about quality is computed here."""
    if paths.evaluation.exists():
        return dict(json.loads(paths.evaluation.read_text(encoding="utf-8")))
    dtype, device = getattr(torch, config.dtype), probe().device_type
    model, tokenizer = import_with_tokenizer(paths.model, dtype=dtype, device=device)
    held_out = list(read_source_files([paths.corpus / "heldout"]))
    score = measure_bits_per_byte(
        model, tokenizer, sample_texts(held_out),
        token_counts=training_token_counts(IndexedDataset(paths.train_data), tokenizer),
    )  # fmt: skip
    tasks = choose_tasks(held_out, num_tasks=NUM_INFILL_TASKS, seed=config.seed)
    fim = config.data.stream.fim  # of a folder that an earlier version began, in the paper's order
    results = fill_lines(model, tokenizer, tasks, max_prompt_tokens=fim.context_tokens, spm=fim.suffix_first)
    frequent_line = most_frequent_line(read_source_files([paths.corpus / "train"]))
    summary = summarize(results, frequent_line=frequent_line)
    write_text(paths.infills, "".join(json.dumps(result.row(), ensure_ascii=False) + "\n" for result in results))
    evaluation = {
        "held_out": asdict(score),
        "infill": asdict(summary),
        "most_frequent_line": frequent_line,
        "shown": [_around(result) for result in results[:SHOWN_INFILLS]],
        "largest_logit_difference": largest_logit_difference(
            import_model(paths.model, dtype=torch.float32),
            paths.model,
            tokenizer.encode(held_out[0].content)[: model.config.max_position_embeddings],
        ),
    }
    write_json(paths.evaluation, evaluation)
    return evaluation


def _trained_steps(paths: Paths) -> int:
    checkpoints = paths.run / CHECKPOINTS
    return CheckpointReader(checkpoints).step if step_folders(checkpoints) else 0


def _around(result: InfillResult) -> dict[str, Any]:
    """A hole with the lines next to it, for people to look at."""
    before, after = result.task.prefix.splitlines(), result.task.suffix.splitlines()[1:]
    return result.row() | {"before": before[-6:], "after": after[:6]}


def _show(evaluation: dict[str, Any], paths: Paths, config: RunConfig) -> None:
    print()
    for hole in evaluation["shown"]:
        print(f"--- {hole['repo']}/{hole['path']}, line {hole['line']}")
        print("\n".join(f"      | {line}" for line in hole["before"][-3:]))
        print(f"model | {hole['completion'].rstrip()}")
        print(f"truth | {hole['truth'].rstrip()}")
        print("\n".join(f"      | {line}" for line in hole["after"][:2]))
        print()
    print_score(from_dict(HeldOutScore, evaluation["held_out"], where=str(paths.evaluation)))
    print_summary(from_dict(InfillSummary, evaluation["infill"], where=str(paths.evaluation)))
    difference = evaluation["largest_logit_difference"]
    checked = (
        "not checked, transformers is not installed" if difference is None else f"logits differ by {difference:.1e}"
    )
    order = " --spm" if config.data.stream.fim.suffix_first else ""
    print(f"model:  {paths.model}, for transformers ({checked}); megacoder infill --model {paths.model}{order} FILE")
    print(f"report: {paths.report}")


def _stage(title: str, make: Callable[[], Any]) -> Any:
    say(f"\n== {title}")
    start = time.perf_counter()
    made = make()
    say(f"   {time.perf_counter() - start:.1f} s")
    return made
