"""`megacoder generate`: continues a text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import answer_room, load_model, print_answer, prompt_room, share_model
from megacoder.core.config import parse_args
from megacoder.core.console import counted, say
from megacoder.core.errors import ConfigError
from megacoder.evaluate.prompts import completion_prompt
from megacoder.evaluate.sampling import Sampling

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Continue a text."""

    model: Path
    """Hugging Face folder, run or checkpoint"""
    prompt: str
    """the text to continue"""
    max_new_tokens: int | None = None
    """stop after this many tokens if the model has not ended the text; if unset, 128, or half the
    model's positions if there are fewer than 256"""
    samples: int = 1
    """number of continuations to draw, one after the other, each with its own random numbers"""
    stop: tuple[str, ...] = ()
    """end the text before the first of these strings"""
    sampling: Sampling = field(default_factory=Sampling)
    loading: Loading = field(default_factory=Loading)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: must be at least 1")


def main(argv: Sequence[str]) -> None:
    """Prints only the continuation on stdout, as it comes; several are separated by a line that numbers them."""
    args = parse_args(GenerateArgs, argv, prog="megacoder generate", flat=True)
    tp = share_model(args.loading.tp, ["generate", *argv])
    if tp is None:
        return
    model, tokenizer = load_model(args.model, args.loading, tp=tp)
    longest = answer_room(model, args.max_new_tokens, otherwise=128)
    prompt = completion_prompt(tokenizer, args.prompt, max_tokens=prompt_room(model, longest))
    if prompt.num_dropped_lines and tp.rank == 0:
        dropped = counted(prompt.num_dropped_lines, "line is", "lines are")
        say(f"the prompt does not fit into the model: its first {dropped} dropped{model.config.positions_advice}")
    for sample in range(args.samples):
        if args.samples > 1:
            print(f"--- {sample + 1}")
        print_answer(
            model, tokenizer, prompt.tokens, max_new_tokens=longest, stop_ids=tokenizer.end_ids, stops=args.stop,
            sampling=args.sampling, name=str(sample),
        )  # fmt: skip
