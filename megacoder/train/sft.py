"""Instruction tuning: pre-training's loop over conversations, and what is prepared before any rank starts.

`prepare` writes into the run's folder `conversations/` (the data as `.bin/.idx`) and `tokenizer/`: the tokenizer with
the chat template of the conversations and, as its end-of-text token, the token that ends an answer. Exports of the run
carry both.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from megacoder.core.console import counted, say
from megacoder.core.errors import ConfigError
from megacoder.core.files import exclusive, making_dir, replacing, write_json
from megacoder.data.chat_format import FormatConfig
from megacoder.data.conversations import Prepared, prepare_conversations
from megacoder.data.folder_settings import GENERATION
from megacoder.data.indexed import idx_path
from megacoder.data.tokenizer import Tokenizer, say_if_changed
from megacoder.parallel.watch import Watch
from megacoder.parallel.world import from_torchrun, launched_ranks
from megacoder.train.config import RunConfig
from megacoder.train.loop import Trainer, check_inputs
from megacoder.train.resuming import check_same_run, open_start
from megacoder.train.setup import open_conversations, start_ranks

__all__ = ["DEFAULTS", "prepare", "prepared_run", "sft"]

DEFAULTS: dict[str, Any] = {
    "schedule": {"kind": "cosine", "peak_lr": 1e-5, "warmup_steps": 100},
    "steps": 500,
    "data": {"train": ["made by megacoder sft"], "stream": {"document_masks": True, "fim": {"rate": 0.0}}},
}
"""What a TOML file may leave out: the paper's settings (arXiv:2401.14196, 3.5)."""


PREPARING_SECONDS = 24 * 3600.0
"""How long ranks wait for the first one, which prepares the conversations: a core encodes about 1 MB a second."""


def prepared_run(config: RunConfig) -> RunConfig:
    """`config` with the data and the tokenizer that `prepare` makes; ConfigError for contradictory settings."""
    data, folder = config.data, config.output
    if not data.conversations.train:
        raise ConfigError(
            "data.conversations.train = []: name what to train on: JSONL or Parquet files, or folders of them"
        )
    if data.stream.fim.rate > 0:
        raise ConfigError(
            f"data.stream.fim.rate = {data.stream.fim.rate}: conversations take no fill-in-the-middle; leave it out"
        )
    if not data.stream.document_masks:
        raise ConfigError(
            "data.stream.document_masks = false: conversations of a window are always masked; leave it out"
        )
    made = folder / "conversations"
    return replace(
        config,
        data=replace(
            data, train=(made / "train",), valid=(made / "valid",) if data.conversations.valid else (),
            tokenizer=folder / "tokenizer",
        ),
    )  # fmt: skip


def prepare(config: RunConfig) -> RunConfig:
    """Makes what `prepared_run(config)` reads, unless it is there; returns that run.

    Raises, and changes nothing, if the output folder belongs to another run, or if a run is at work in it.
    """
    run = prepared_run(config)
    open_start(run)  # fails here if the weights are missing or of another model
    with making_dir(config.output), exclusive(config.output, what="run"):
        check_same_run(run)
        _prepare(config, run)
    return run


def _prepare(config: RunConfig, run: RunConfig) -> None:
    tokenizer = Tokenizer.load(config.data.tokenizer)
    conversations = config.data.conversations
    before = idx_path(run.data.train[0]).stat().st_mtime_ns if idx_path(run.data.train[0]).exists() else None
    seq_length = config.data.stream.seq_length
    trained = prepare_conversations(
        conversations.train, run.data.train[0], tokenizer, conversations,
        seq_length=seq_length, repeats=conversations.repeats,
    )  # fmt: skip
    if idx_path(run.data.train[0]).stat().st_mtime_ns != before:  # ranks find what their launcher has reported already
        say_if_changed(tokenizer, config.data.tokenizer)
        _say(trained, config)
    for valid in run.data.valid:
        prepare_conversations(conversations.valid, valid, tokenizer, conversations, seq_length=seq_length)
    _write_tokenizer(config.data.tokenizer, run.data.tokenizer, conversations.format, tokenizer)
    for prefix in (*run.data.train, *run.data.valid):
        open_conversations(run, prefix, tokenizer, dp_rank=0, dp_size=1)  # fails here if windows are too short


def sft(config: RunConfig) -> None:
    """Runs or resumes `config` on the ranks that torchrun started, or on this process alone."""
    run = prepared_run(config)
    check_inputs(config)
    if launched_ranks() is None or from_torchrun("RANK", 0) == 0:
        prepare(config)  # the others wait until this rank joins them, so that a malformed row starts nothing
    world = start_ranks(run, join_seconds=PREPARING_SECONDS)
    with Watch(world, timeout_seconds=config.timeout_seconds, folder=config.output):
        Trainer(run, world).run()
    world.close()


def _say(prepared: Prepared, config: RunConfig) -> None:
    seq_length, too_long = config.data.stream.seq_length, config.data.conversations.too_long
    windows = config.steps * config.global_batch_size * seq_length
    left_out = 0 if too_long == "skip" else prepared.unusable_tokens  # skipped ones are not among the tokens
    seen = prepared.tokens - prepared.cut_tokens - left_out
    repeated = config.data.conversations.repeats
    epochs = windows / seen if seen else 0.0
    number = counted(prepared.read if repeated else prepared.conversations, "conversation", "conversations")
    say(
        number + (f" in the files, {prepared.conversations:,} in an epoch (repeats)" if repeated else "")
        + f": {prepared.tokens:,} tokens, {prepared.trained_tokens:,} of them trained"
        + (f"; {counted(config.steps, 'step is', 'steps are')} {_shortly(epochs)} epochs" if seen else "")
    )  # fmt: skip
    if prepared.unusable:
        why = "longer than" if too_long == "skip" else "no answer begins within"
        number = counted(prepared.unusable, "conversation", "conversations")
        say(
            f"{number} left out, {prepared.unusable_tokens:,} tokens: {why} data.stream.seq_length = {seq_length}; "
            f"the first: {prepared.first_unusable}"
        )
    if prepared.cut:
        number = counted(prepared.cut, "conversation", "conversations")
        say(
            f"{number} cut at data.stream.seq_length = {seq_length}, "
            f"{prepared.cut_tokens:,} tokens lost; the first: {prepared.first_cut}"
        )
    if prepared.skipped:
        rows = counted(prepared.skipped, "malformed row", "malformed rows")
        say(f"{rows} skipped; the first: {prepared.first_skipped}")


def _shortly(number: float) -> str:
    """With one decimal place, or for a smaller number with its first digit."""
    return f"{number:,.1f}" if number >= 0.1 else f"{number:.1g}"


def _write_tokenizer(source: Path, folder: Path, chat: FormatConfig, tokenizer: Tokenizer) -> None:
    """Copies `source`, which `tokenizer` is, with the chat template and the end marker; tokenizer.json last, which
    marks it as complete."""
    if source.is_file():
        source = source.parent
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = source / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.exists() else {}
    end = chat.end_token(tokenizer.control_ids)
    assert end is not None  # the conversations have been written with it
    settings |= {"chat_template": chat.jinja, "eos_token": end}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / GENERATION, {"eos_token_id": [tokenizer.control_ids[end]]})
    with replacing(folder / "tokenizer.json") as temporary:
        shutil.copyfile(source / "tokenizer.json", temporary)
