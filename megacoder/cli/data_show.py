"""`megacoder data show RUN.toml`: what a step trains, as text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacoder.cli.run_words import read_run
from megacoder.core.config import check_at_least
from megacoder.core.console import counted, progress, say
from megacoder.core.errors import ConfigError
from megacoder.data.showing import ShownDocument, show_windows
from megacoder.train.setup import load_tokenizer, open_before

__all__ = ["main"]

PROG = "megacoder data show RUN.toml"
USAGE = f"{PROG} --step N [--count N] [--windows N ...] [--grep TEXT] [any setting of the run, as in megacoder train]"


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Prints the documents of the windows that all ranks of a run together train in a step, with control tokens by
    their names; of conversations, what is trained is between ⟦ and ⟧. Further options are settings of the run."""

    step: int
    """which step, counted from 1 as in the run's log; at most the run's `steps`"""
    count: int = 4
    """number of windows to show at most"""
    windows: tuple[int, ...] = ()
    """show these, however many, by their numbers in the step, counted from 1"""
    grep: str | None = None
    """show only documents that contain this text, and windows with such documents"""
    checkpoint: Path | None = None
    """start from the data position in this checkpoint, written before the step, instead of from the beginning, which
    takes long for a late step"""
    json: bool = False
    """print JSON: of each window its number and documents; of each document its first token's place in the window,
    counted from 1, its number of tokens, its text and, of conversations, the parts that are trained"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "step", "count")


def main(argv: Sequence[str]) -> None:
    """RUN.toml first, then the command's own options and dotted overrides of the run's settings."""
    run = read_run(ShowConfig, argv, prog=PROG, absent=lambda _: {"output": "show"}, lists_settings=False, usage=USAGE)
    options, config = run.options, run.config
    if options.step > config.steps:
        raise ConfigError(f"--step {options.step}: the run ends at step {config.steps}")
    for number in options.windows:
        if not 1 <= number <= config.global_batch_size:
            raise ConfigError(f"--windows {number}: a step has windows 1 to {config.global_batch_size}")
    tokenizer = load_tokenizer(config)
    [stream], done = open_before(options.step, config, tokenizer, checkpoint=options.checkpoint)
    with progress("earlier steps", options.step - 1 - done, quiet=options.step - 1 == done) as bar:
        for earlier in range(options.step - 1 - done):
            stream.next_batch()
            bar.update(earlier + 1)
    windows = list(enumerate(show_windows(stream.next_batch(), tokenizer), start=1))
    if options.windows:
        windows = [windows[number - 1] for number in options.windows]
    count = len(options.windows) or options.count
    if options.grep is not None:
        windows = [(number, [one for one in window if options.grep in one.text]) for number, window in windows]
    found = [(number, window) for number, window in windows if window]
    in_parts = bool(config.data.conversations.train)
    if options.json:
        shown = [
            {"window": number, "documents": [_plain(document, in_parts=in_parts) for document in window]}
            for number, window in found[:count]
        ]
        print(json.dumps({"step": options.step, "windows": shown}, indent=2, ensure_ascii=False))
    else:
        for number, window in found[:count]:
            print(f"=== step {options.step}, window {number} of {config.global_batch_size}")
            for document in window:
                _print(document, in_parts=in_parts)
    if options.grep is not None:
        say(f"{counted(len(found), 'window', 'windows')} of {len(windows):,} with {options.grep!r}")
    if len(found) > count:
        say(f"the first {count:,} of {len(found):,} windows; --count shows more")


def _plain(document: ShownDocument, *, in_parts: bool) -> dict[str, Any]:
    trained = {"trained": [part.text for part in document.parts if part.trained]} if in_parts else {}
    return {"first": document.first + 1, "tokens": document.tokens, "text": document.text, **trained}


def _print(document: ShownDocument, *, in_parts: bool) -> None:
    padding = "" if document.parts else ": padding"
    print(f"--- tokens {document.first + 1:,} to {document.first + document.tokens:,}{padding}")
    if document.parts:
        marked = "".join(f"⟦{part.text}⟧" if part.trained else part.text for part in document.parts)
        text = marked if in_parts else document.text
        print(text, end="" if text.endswith("\n") else "\n")
