"""`megacoder generate`: continues a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megacoder.cli.model_folder import ComputeDtype, answer_room, load_model, prompt_room, share_model
from megacoder.core.config import parse_args
from megacoder.core.console import counted, say
from megacoder.core.errors import ConfigError
from megacoder.evaluate.generate import Sampling, generate
from megacoder.evaluate.prompts import completion_prompt
from megacoder.evaluate.stops import StopStrings

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
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by this"""
    top_k: int = 0
    """draw from this many likeliest tokens; 0 draws from all"""
    top_p: float = 1.0
    """draw from the fewest tokens whose probabilities sum to this"""
    seed: int = 0
    """the same seed draws the same text"""
    stop: tuple[str, ...] = ()
    """end the text before the first of these strings"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; if unset, the model's"""
    tp: int = 1
    """tensor-parallel processes that share the model"""
    dtype: ComputeDtype = "stored"
    """dtype to compute in; stored: the model's own"""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: must be at least 1")


def main(argv: Sequence[str]) -> None:
    """Prints only the continuation on stdout, as it comes; several are separated by a line that numbers them."""
    args = parse_args(GenerateArgs, argv, prog="megacoder generate")
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    tp = share_model(args.tp, ["generate", *argv])
    if tp is None:
        return
    model, tokenizer = load_model(args.model, args.dtype, tokenizer=args.tokenizer, tp=tp)
    longest = answer_room(model, args.max_new_tokens, otherwise=128)
    prompt = completion_prompt(tokenizer, args.prompt, max_tokens=prompt_room(model, longest))
    if prompt.num_dropped_lines and tp.rank == 0:
        dropped = counted(prompt.num_dropped_lines, "line is", "lines are")
        say(f"the prompt does not fit into the model: its first {dropped} dropped")
    for sample in range(args.samples):
        if args.samples > 1:
            print(f"--- {sample + 1}")
        streamed = StopStrings(tokenizer, args.stop, lambda text: print(text, end="", flush=True))
        generate(
            model,
            [prompt.tokens],
            max_new_tokens=longest,
            stop_ids={tokenizer.eos_id},
            sampling=sampling,
            names=[str(sample)],
            watcher=lambda _, tokens, streamed=streamed: streamed.add(tokens[-1]),  # type: ignore[misc]
        )
        streamed.finish()
        print()
