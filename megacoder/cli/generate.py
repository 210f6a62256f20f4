"""`megacoder generate`: continues a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megacoder.cli.model_folder import ComputeDtype, load_model, prompt_room
from megacoder.core.config import parse_args
from megacoder.core.console import say
from megacoder.evaluate.generate import Sampling, generate
from megacoder.evaluate.prompts import completion_prompt

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Continue a text."""

    model: Path
    """Hugging Face folder with a tokenizer, as an export writes it"""
    prompt: str
    """the text to continue"""
    max_new_tokens: int = 128
    """stop after so many tokens, if the model has not ended the text before"""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it"""
    top_p: float = 1.0
    """draw from the fewest tokens that together are this likely"""
    seed: int = 0
    """the same seed draws the same text"""
    dtype: ComputeDtype = "stored"
    """what to compute in"""


def main(argv: Sequence[str]) -> None:
    """Prints the continuation alone on stdout."""
    args = parse_args(GenerateArgs, argv, prog="megacoder generate")
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    model, tokenizer = load_model(args.model, args.dtype)
    prompt = completion_prompt(tokenizer, args.prompt, max_tokens=prompt_room(model, args.max_new_tokens))
    if prompt.num_dropped_lines:
        say(f"the prompt does not fit into the model: its first {prompt.num_dropped_lines} lines are left out")
    [tokens] = generate(
        model,
        [prompt.tokens],
        max_new_tokens=args.max_new_tokens,
        stop_ids={tokenizer.eos_id},
        sampling=sampling,
    )
    print(tokenizer.decode(tokens))
