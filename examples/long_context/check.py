"""Before and after an extension of the context: loss by position, and retrieval of a planted definition.

    megacoder checkpoint export runs/pretrain_1.3b before
    megacoder checkpoint export runs/long_context_1.3b after
    python examples/long_context/check.py --models before after --data data/heldout --length 16384

The model before is also tested beyond the positions that it was trained on: what the extension is for.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megacoder.cli.loading import Loading
from megacoder.cli.model_folder import load_model
from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import MegacoderError
from megacoder.data.sidecar import open_dataset
from megacoder.evaluate.long_context import loss_by_position, retrieval
from megacoder.model.transformer import Transformer
from megacoder.parallel.tensor import ALONE


@dataclass(frozen=True, kw_only=True)
class Options:
    """Long-context check of exported models."""

    models: tuple[Path, ...]
    """Hugging Face folders, before and after"""
    data: Path
    """prefix of held-out .bin/.idx made with their tokenizer"""
    length: int = 16_384
    """tokens of context"""
    documents: int = 20
    """number of long documents to measure the loss on"""
    trials: int = 10
    """planted definitions at each depth"""
    json: bool = False
    """print JSON instead of tables"""


def main() -> None:
    options = parse_args(Options, None, prog="examples/long_context/check.py")
    results = {str(folder): _look_at(folder, options) for folder in options.models}
    if options.json:
        print(json.dumps(results, indent=2))
        return
    names = list(results)
    first = results[names[0]]
    table(
        f"Loss by position, nats, {options.length:,} tokens", ["tokens", *names],
        [[f"{start:,} to {stop:,}", *(f"{results[name]['loss'][row][2]:.3f}" for name in names)]
         for row, (start, stop, _) in enumerate(first["loss"])],
    )  # fmt: skip
    table(
        "Planted definitions found", ["depth", *names],
        [[f"{depth:.0%}", *("{1} of {2}".format(*results[name]["found"][row]) for name in names)]
         for row, (depth, _, _) in enumerate(first["found"])],
    )  # fmt: skip


def _look_at(folder: Path, options: Options) -> dict[str, list[tuple[float, float, float]]]:
    model, tokenizer = load_model(folder, Loading(), tp=ALONE)
    model = _with_room(model, options.length)
    dataset = open_dataset(options.data, tokenizer)
    numbers = (number for number in range(dataset.num_documents) if len(dataset.document(number)) >= options.length)
    documents = [dataset.document(number) for number, _ in zip(numbers, range(options.documents), strict=False)]
    say(f"{folder}: the loss of {len(documents)} documents of {options.length:,} tokens")
    losses = loss_by_position(model, tokenizer, documents, length=options.length)
    say(f"{folder}: {options.trials} planted definitions at each depth")
    found = retrieval(model, tokenizer, length=options.length, trials=options.trials)
    return {
        "loss": [(row.start, row.stop, row.loss) for row in losses],
        "found": [(row.depth, row.found, row.trials) for row in found],
    }


def _with_room(model: Transformer, length: int) -> Transformer:
    """The same weights with as many positions as the check needs; RoPE as it was trained."""
    if model.config.max_position_embeddings >= length:
        return model
    weight = model.lm_head.weight
    longer = Transformer(replace(model.config, max_position_embeddings=length)).to(weight.device, weight.dtype)
    with torch.no_grad():
        longer.load_state_dict(model.state_dict())
    return longer


if __name__ == "__main__":
    try:
        main()
    except MegacoderError as error:
        raise SystemExit(f"check: {error}") from None
