"""`megacoder chat`: a conversation in the format that the model was tuned with, on the terminal or from a pipe."""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import (
    answer_room,
    chat_format_of,
    load_model,
    print_answer,
    prompt_room,
    share_model,
)
from megacoder.core.config import parse_args
from megacoder.core.console import say
from megacoder.core.errors import DataError
from megacoder.core.text import is_unicode
from megacoder.data.chat_format import ChatFormat, Message
from megacoder.evaluate.sampling import Sampling
from megacoder.parallel.collectives import broadcast_from_first
from megacoder.parallel.tensor import TensorParallel

__all__ = ["main"]

_PATIENCE_SECONDS = 7 * 24 * 3600.0
"""How long the other ranks wait for the next turn."""


@dataclass(frozen=True, kw_only=True)
class ChatArgs:
    """Talk to a model: each line is a turn, a line that ends in a backslash continues on the next; Ctrl-D ends."""

    model: Path
    """Hugging Face folder, run or checkpoint"""
    system: str | None = None
    """system prompt, instead of the built-in one"""
    max_new_tokens: int | None = None
    """longest answer in tokens; if unset, 512, or half the model's positions if there are fewer than 1,024"""
    sampling: Sampling = field(default_factory=Sampling)
    loading: Loading = field(default_factory=Loading)


def main(argv: Sequence[str]) -> None:
    """Prints the answers on stdout as they come; when the context is full, the first turns are dropped."""
    args = parse_args(ChatArgs, argv, prog="megacoder chat", flat=True)
    tp = share_model(args.loading.tp, ["chat", *argv], timeout_seconds=_PATIENCE_SECONDS)
    if tp is None:
        return
    model, tokenizer = load_model(args.model, args.loading, tp=tp)
    chat = ChatFormat(chat_format_of(args.model, tokenizer=args.loading.tokenizer), tokenizer)
    longest = answer_room(model, args.max_new_tokens, otherwise=512)
    room = prompt_room(model, longest)
    system: list[Message] = [] if args.system is None else [("system", args.system)]
    turns: list[Message] = []
    for number, said in enumerate(_shared_turns(tp, model.lm_head.weight.device)):
        turns.append(("user", said))
        while len(tokens := chat.prompt([*system, *turns])) > room and len(turns) > 1:
            turns = turns[2:]
            if tp.rank == 0:
                say("the conversation no longer fits into the model: its first turns are forgotten")
        if len(tokens) > room:
            raise DataError(f"the turn has {len(tokens)} tokens with its template; the model has room for {room}")
        answer = print_answer(
            model, tokenizer, tokens, max_new_tokens=longest, stop_ids={chat.end_id, *tokenizer.end_ids},
            sampling=args.sampling, name=str(number),
        )  # fmt: skip
        turns.append(("assistant", chat.answer(answer)))


def _shared_turns(tp: TensorParallel, device: torch.device) -> Iterator[str]:
    """What is typed at the first rank, on all of them."""
    if tp.size == 1:
        yield from _turns()
        return
    typed = _turns() if tp.rank == 0 else iter(())
    while True:
        said = next(typed, "").encode()  # empty at the end alone
        size = torch.tensor([len(said)], device=device)
        broadcast_from_first(size, tp.group)
        if not size:
            return
        text = torch.zeros(int(size), dtype=torch.uint8)
        if said:
            text = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        text = text.to(device)
        broadcast_from_first(text, tp.group)
        yield text.cpu().numpy().tobytes().decode()


def _turns() -> Iterator[str]:
    """What is typed, lines that end in a backslash joined with the next; a turn that is not UTF-8 is skipped."""
    asking = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a decoding error would lose the next turns too
    lines: list[str] = []
    while True:
        if asking:
            print(">>> " if not lines else "... ", end="", flush=True)
        line = sys.stdin.readline()
        if not line and not lines:
            return
        lines.append(line.rstrip("\n").removesuffix("\\"))
        if not line.rstrip("\n").endswith("\\"):
            said, lines = "\n".join(lines).strip(), []
            if not is_unicode(said):
                say(f"{said!r} is not UTF-8 and is skipped; write it in UTF-8")
            elif said:
                yield said
