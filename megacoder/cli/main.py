"""The `megacoder` command: a table of sub-commands, each a small module that is imported only when it runs.

`python -m megacoder` and the workers that torchrun starts come through here too. An error meant for the user ends as
one line on stderr. A rank that has joined others then ends at once, without Python's and torch's shutdown: their
destructors wait for ranks that are gone, take seconds in which torchrun's SIGTERM arrives, and may abort the process.
"""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from megacoder.core.config import did_you_mean
from megacoder.core.console import say
from megacoder.core.errors import AlikeOnAllRanks, ConfigError, MegacoderError, RankLost
from megacoder.core.processes import Terminated, sigterm_as_interrupt
from megacoder.core.text import is_unicode
from megacoder.version import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module with a `main(argv)`, or module:function; what it does)
    "quickstart": ("megacoder.cli.quickstart", "the whole job, from sources on this machine to infilled code"),
    "corpus build": ("megacoder.cli.corpus_build", "repositories -> filtered, deduplicated, ordered documents"),
    "corpus report": ("megacoder.cli.corpus_report", "what a corpus holds, and what was dropped and why"),
    "tokenizer train": ("megacoder.cli.data:train_tokenizer", "train a byte-level BPE with DeepSeek's pre-tokenizer"),
    "tokenizer extend": ("megacoder.cli.tokenizer_extend", "add control tokens to a model's tokenizer"),
    "preprocess": ("megacoder.cli.data:preprocess", "encode documents into the .bin/.idx that training reads"),
    "data inspect": ("megacoder.cli.data:inspect", "what is in a .bin/.idx pair"),
    "data merge": ("megacoder.cli.data:merge", "several .bin/.idx pairs as one"),
    "data digest": ("megacoder.cli.data_digest", "a digest of each step's tokens, the same on any number of ranks"),
    "data show": ("megacoder.cli.data_show", "what a step trains, as text: its windows and their documents"),
    "train": ("megacoder.cli.train", "pre-train in one process, under torchrun, or on --nproc ranks"),
    "sft": ("megacoder.cli.sft", "instruction tuning on conversations, started like train"),
    "report": ("megacoder.cli.report", "a run so far as one HTML file: loss, speed, memory, data, schedule"),
    "profile": ("megacoder.cli.profile", "where the time and memory of a run's steps go, with a trace"),
    "plan": ("megacoder.cli.plan", "layouts, memory and time on a cluster, without a GPU; schedules drawn"),
    "ops": ("megacoder.cli.ops", "which kernels run on this machine, and why the others do not"),
    "checkpoint inspect": ("megacoder.cli.checkpoint:inspect", "what a checkpoint holds, as a table or as JSON"),
    "checkpoint verify": ("megacoder.cli.checkpoint:verify", "check every byte of a checkpoint; name each bad file"),
    "checkpoint reshard": ("megacoder.cli.checkpoint_convert:reshard_main", "a checkpoint in another layout"),
    "checkpoint export": ("megacoder.cli.checkpoint_convert:export_main", "a run's weights as a Hugging Face folder"),
    "checkpoint import": ("megacoder.cli.checkpoint_convert:import_main", "a Hugging Face folder to train further"),
    "generate": ("megacoder.cli.generate", "continue a text"),
    "infill": ("megacoder.cli.infill", "fill in a line or a <FILL> mark of a file"),
    "chat": ("megacoder.cli.chat", "chat with an instruction-tuned model"),
    "eval humaneval": ("megacoder.cli.eval_benchmark:humaneval", "HumanEval, Python and the multilingual sets"),
    "eval mbpp": ("megacoder.cli.eval_benchmark:mbpp", "MBPP, 3-shot"),
    "eval leetcode": ("megacoder.cli.eval_benchmark:leetcode", "LeetCode Contest, by difficulty"),
    "eval ds1000": ("megacoder.cli.eval_benchmark:ds1000", "DS-1000, completion mode, by library"),
    "eval pal": ("megacoder.cli.eval_benchmark:pal", "math solved by programs: GSM8K, MATH and five more"),
    "eval crosscode": ("megacoder.cli.eval_benchmark:crosscode", "CrossCodeEval, with and without retrieval"),
    "eval infill": ("megacoder.cli.eval_infill", "fill in lines of held-out files, or of a published set"),
    "eval long-context": ("megacoder.cli.eval_long_context", "loss by position, and planted definitions found again"),
    "eval perplexity": ("megacoder.cli.eval_perplexity", "held-out bits per byte, beside xz and a unigram model"),
}
"""Sub-commands in the order in which `--help` shows them."""

INTERRUPTED = 130
"""Exit code after SIGINT; of the ranks of a run also after SIGTERM or SIGHUP."""
TERMINATED = 143
"""Exit code after SIGTERM."""
FIRST_RANK_SECONDS = 10.0
"""How much later than the others the first rank of a machine may meet an error that all of them meet."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one sub-command; exits with 0, or with the error's code after one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_words(words)
        with contextlib.nullcontext() if _answers_signals(words) else sigterm_as_interrupt():
            _dispatch(words)
    except RankLost as error:
        if not error.told:
            say(f"megacoder: {error}")
        _end(error.exit_code)
    except MegacoderError as error:
        if isinstance(error, AlikeOnAllRanks) and os.environ.get("LOCAL_RANK", "0") != "0":
            _leave_it_to_the_first(error.exit_code)
        _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as in `megacoder ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Terminated:
        _fail("terminated", TERMINATED)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        said = ["out of memory", *str(error).strip().splitlines()[:1]]
        _fail(f"{': '.join(said)}; `megacoder plan` says what a model and its batches need", 1)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'writing'}: {error.strerror or error}", 1)


def _answers_signals(words: Sequence[str]) -> bool:
    """Whether the command handles signals itself: a run, which writes a checkpoint, or a rank, which torchrun ends."""
    return words[:1] in (["train"], ["sft"]) or "LOCAL_RANK" in os.environ


def _check_words(words: Sequence[str]) -> None:
    """Bytes that are not UTF-8 arrive as lone surrogates, which can neither be encoded for a model nor be written."""
    for word in words:
        if not is_unicode(word):
            raise ConfigError(f"{word!r} is not UTF-8; write it in UTF-8, or rename the file of this name")


def _is_lack_of_memory(error: BaseException) -> bool:
    """Decided without torch, which most commands do not load: a GPU's has its own class, a CPU's only its message."""
    name = type(error).__name__
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return
    if words[0] == "--version":
        _print_version(verbose="--verbose" in words[1:])
        return
    for size in (2, 1):
        name = " ".join(words[:size])
        if name in COMMANDS:
            module, _, function = COMMANDS[name][0].partition(":")
            getattr(importlib.import_module(module), function or "main")(words[size:])
            return
    group = [name for name in COMMANDS if name.split()[0] == words[0]]
    if group and len(words) > 1 and not words[1].startswith("-"):
        name = " ".join(words[:2])
        raise ConfigError(f"unknown command {name!r}{did_you_mean(name, group)}; see megacoder --help")
    if group:
        raise ConfigError(f"{words[0]!r} needs a second word: {', '.join(group)}")
    hint = did_you_mean(words[0], [name.split()[0] for name in COMMANDS])
    raise ConfigError(f"unknown command {words[0]!r}{hint}; see megacoder --help")


def _leave_it_to_the_first(code: int) -> None:
    """Leaves an error that every rank of a machine meets to its first rank; returns if that has not reported it.

    Torchrun kills all ranks as soon as it sees that one has failed. If another rank ended before the first, which may
    have started later, nobody would report the error. After a request to stop, torchrun waits for all ranks.
    """
    if code in (0, INTERRUPTED):
        _end(code)
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(FIRST_RANK_SECONDS)
        return
    _end(code)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: megacoder COMMAND [OPTIONS]   (megacoder COMMAND --help for its options)", "", *rows, "",
         "  --version [--verbose]  the version, and which optional parts are built"]
    )  # fmt: skip


def _print_version(*, verbose: bool) -> None:
    print(f"megacoder {__version__}")
    if verbose:
        from megacoder.core.device import describe_parts

        for part, state in describe_parts():
            print(f"  {part:<14} {state}")


def _fail(message: str, code: int) -> NoReturn:
    say(f"megacoder: {' '.join(message.split())}")
    _end(code)


def _end(code: int) -> NoReturn:
    distributed = sys.modules.get("torch.distributed")  # loaded by ranks
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        if sys.stdout is not None:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
