"""Does transformers compute the same logits from an exported folder?"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from megacoder.model.transformer import Transformer

__all__ = ["largest_logit_difference"]


@torch.inference_mode()
def largest_logit_difference(model: Transformer, folder: Path, tokens: Sequence[int]) -> float | None:
    """Largest absolute difference in fp32 of the logits of `tokens` between `model` and `folder` in transformers.

    None where transformers is not installed (`pip install megacoder[hf]`).
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = torch.tensor([list(tokens)])
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = model.to("cpu", torch.float32)
    return float((ours.logits(ours(ids)) - peer(input_ids=ids).logits).abs().max())
