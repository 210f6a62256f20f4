"""`megacoder infill`: fills in what a file leaves open, a `<FILL>` mark or one of its lines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import answer_room, load_model, print_answer, prompt_room, share_model
from megacoder.core.config import parse_args
from megacoder.core.console import counted, say
from megacoder.core.errors import ConfigError, DataError
from megacoder.evaluate.prompts import SHORTEST_INFILL, infill_prompt
from megacoder.evaluate.repository import dependency_context

__all__ = ["main"]

_MARK = "<FILL>"


@dataclass(frozen=True, kw_only=True)
class InfillArgs:
    """Fill in a line or a <FILL> mark of a file; the file stays as it is."""

    file: tyro.conf.Positional[Path]
    """source file, with one <FILL> mark unless --line is given"""
    model: Path
    """Hugging Face folder, run or checkpoint"""
    line: int | None = None
    """number of the line to rewrite, from 1; the answer ends with the line"""
    spm: bool = False
    """ask with the suffix first, for a model trained in that order (data.stream.fim.spm_rate)"""
    context: Path | None = None
    """folder of the repository: the files that this one depends on precede it in the prompt, in dependency order"""
    max_new_tokens: int | None = None
    """stop after this many tokens if the model has not ended the answer; if unset, 128, or half the
    model's positions if there are fewer than 256"""
    loading: Loading = field(default_factory=Loading)


def main(argv: Sequence[str]) -> None:
    """Prints only what was filled in on stdout."""
    args = parse_args(InfillArgs, argv, prog="megacoder infill", flat=True)
    text = _read(args.file)
    prefix, suffix = _around_mark(args.file, text) if args.line is None else _around_line(args.file, text, args.line)
    if args.context is not None:
        others, comment = dependency_context(args.context, args.file)
        prefix = others + comment + prefix
    tp = share_model(args.loading.tp, ["infill", *argv])
    if tp is None:
        return
    model, tokenizer = load_model(args.model, args.loading, tp=tp)
    longest = answer_room(model, args.max_new_tokens, otherwise=128)
    room = prompt_room(model, longest, shortest=SHORTEST_INFILL)
    prompt = infill_prompt(tokenizer, prefix, suffix, max_tokens=room, spm=args.spm)
    if prompt.num_dropped_lines and tp.rank == 0:
        dropped = counted(prompt.num_dropped_lines, "line is", "lines are")
        say(f"{args.file} does not fit into the model: its farthest {dropped} dropped{model.config.positions_advice}")
    stops = [] if args.line is None else ["\n"]
    print_answer(model, tokenizer, prompt.tokens, max_new_tokens=longest, stop_ids=tokenizer.end_ids, stops=stops)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"{path}: not readable: {reason}") from None


def _around_mark(path: Path, text: str) -> tuple[str, str]:
    parts = text.split(_MARK)
    if len(parts) == 1:
        raise DataError(f"{path}: no {_MARK} mark in it; put one where code is missing, or name a line with --line")
    if len(parts) > 2:
        raise DataError(f"{path}: {len(parts) - 1} {_MARK} marks; exactly one can be filled in")
    return parts[0], parts[1]


def _around_line(path: Path, text: str, line: int) -> tuple[str, str]:
    lines = text.removesuffix("\n").split("\n")
    if not 1 <= line <= len(lines):
        raise ConfigError(f"--line {line}: {path} has lines 1 to {len(lines)}")
    start = sum(len(before) + 1 for before in lines[: line - 1])
    return text[:start], text[start + len(lines[line - 1]) :]
