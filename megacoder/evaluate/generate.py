"""Prompts to continuations: batched, with a key-value cache, greedy unless a temperature is given.

Legend: B sequences of one batch, V vocabulary.
A result depends only on the model, its prompt and its name, not on what else is in its batch, but for rounding: padding
is invisible (`megacoder.model.kv_cache`), and a sampled sequence draws from a generator keyed by (seed, name). Sums are
taken in another order in another batch, or with another tp; in bf16 that decides now and then between two tokens, and
all that follows. Prompts are sorted by length before they are batched, so that there is little padding, and a batch
shrinks when half of its sequences are done. Where ranks share the model (tp), each calls this with the same arguments
and gets the same tokens: those that the first rank draws, since a GPU may round a sum of probabilities differently each
time.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from megacoder.core.console import counted
from megacoder.core.errors import DataError
from megacoder.evaluate.sampling import Sampling
from megacoder.model.config import ModelConfig
from megacoder.model.decode import Decoder
from megacoder.model.init import keyed_generator
from megacoder.model.kv_cache import KVCache
from megacoder.model.transformer import Transformer
from megacoder.parallel.collectives import broadcast_from_first
from megacoder.parallel.tensor import TensorParallel

__all__ = ["Watcher", "generate"]

Watcher = Callable[[int, list[int]], bool]
"""Called with (place of the prompt, its new tokens so far) after each new token; True ends that sequence."""


@torch.no_grad()  # not inference_mode: rotary tables that move to a GPU here must serve training later
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    num_ids: int | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    names: Sequence[str] | None = None,
    watcher: Watcher | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to its first of `stop_ids` (not included) or `max_new_tokens` of them.

    Ids are picked from the first `num_ids`: a model may have more than its tokenizer (DeepSeek's: 32,256 and 32,022).
    `names` key the random numbers of each sequence, by default its place in the list. Raises DataError for a prompt
    that is empty, holds an id outside the vocabulary, or leaves no room for `max_new_tokens` in the model's
    `max_position_embeddings`.
    """
    for place, prompt in enumerate(prompts):
        _check_prompt(prompt, place, max_new_tokens, model.config)
    sampling = Sampling() if sampling is None else sampling
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        drawn_by = [str(place) if names is None else names[place] for place in places]
        picker = _Picker(sampling, num_ids, drawn_by, max_new_tokens, model.lm_head.weight.device, model.tp)
        batch = _Batch(model, places, [prompts[place] for place in places], max_new_tokens, picker)
        batch.run(results, set(stop_ids), watcher)
    return results


class _Batch:
    """Sequences that run through the model together."""

    def __init__(
        self,
        model: Transformer,
        places: list[int],
        prompts: list[Sequence[int]],
        max_new_tokens: int,
        picker: "_Picker",
    ) -> None:
        self.model, self.places, self.max_new_tokens, self.picker = model, places, max_new_tokens, picker
        weight, lengths = model.lm_head.weight, [len(prompt) for prompt in prompts]
        width = max(lengths)
        self.device = weight.device
        self.tokens_BS = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        self.cache = KVCache(model.config, lengths, capacity=width + max_new_tokens, like=weight, tp=model.tp)

    def run(self, results: list[list[int]], stop_ids: set[int], watcher: Watcher | None) -> None:
        """Appends new tokens to `results` until every sequence is done."""
        model, next_B = self.model, torch.empty(0)
        decoder: Decoder | None = None
        rows = list(range(len(self.places)))  # the prompt that each sequence of the batch continues
        done: set[int] = set()
        for step in range(self.max_new_tokens):
            if step == 0:
                for part_BS in self.tokens_BS.split(self.cache.longest_pass, dim=1):
                    hidden_BD = model(part_BS, cache=self.cache)[:, -1]
            else:
                decoder = decoder or Decoder(model, self.cache)
                hidden_BD = decoder.step(next_B)
            next_B = self.picker.pick(model.logits(hidden_BD), rows, step)
            for row, token in zip(rows, next_B.tolist(), strict=True):
                if row in done:
                    continue
                place = self.places[row]
                if token in stop_ids:
                    done.add(row)
                    continue
                results[place].append(token)
                if watcher is not None and watcher(place, results[place]):
                    done.add(row)
            if len(done) == len(self.places):
                break
            going = [index for index, row in enumerate(rows) if row not in done]
            if 2 * len(going) <= len(rows):
                kept_B = torch.tensor(going, device=self.device)
                self.cache.keep(kept_B)
                decoder = None
                next_B, rows = next_B[kept_B], [rows[index] for index in going]


class _Picker:
    """Picks next tokens for the sequences of one batch; their random numbers are drawn before the first step."""

    def __init__(
        self,
        sampling: Sampling,
        num_ids: int | None,
        names: list[str],
        max_new_tokens: int,
        device: torch.device,
        tp: TensorParallel,
    ) -> None:
        self.sampling, self.num_ids, self.tp = sampling, num_ids, tp
        if sampling.temperature > 0:
            drawn = [torch.rand(max_new_tokens, generator=keyed_generator(sampling.seed, name)) for name in names]
            self.uniform_BN = torch.stack(drawn).to(device)

    def pick(self, logits_BV: Tensor, rows: list[int], step: int) -> Tensor:
        """One id for each row (B,), the same on all ranks."""
        logits_BV = logits_BV[:, : self.num_ids]
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        drawn_B = self._draw(logits_BV, rows, step)
        broadcast_from_first(drawn_B, self.tp.group)
        return drawn_B

    def _draw(self, logits_BV: Tensor, rows: list[int], step: int) -> Tensor:
        probabilities, ids_BV = (logits_BV.float() / self.sampling.temperature).softmax(-1).sort(-1, descending=True)
        upto_BV = probabilities.cumsum(-1)
        if self.sampling.top_k:  # top_p then applies to what top_k leaves
            last = min(self.sampling.top_k, upto_BV.shape[-1]) - 1
            probabilities, upto_BV = (x / upto_BV[:, last, None] for x in (probabilities, upto_BV))
            upto_BV[:, last:] = 1.0
            probabilities[:, last + 1 :] = 0.0
        # a token is kept if those before it do not reach top_p: the likeliest always is kept
        kept_B = (upto_BV - probabilities < self.sampling.top_p).sum(-1, keepdim=True) - 1
        drawn_B = self.uniform_BN[rows, step, None] * upto_BV.gather(-1, kept_B)
        index_B = torch.minimum((upto_BV <= drawn_B).sum(-1, keepdim=True), kept_B)
        if self.sampling.top_k:
            index_B = index_B.clamp_max(self.sampling.top_k - 1)
        return ids_BV.gather(-1, index_B).squeeze(-1)


def _check_prompt(prompt: Sequence[int], place: int, max_new_tokens: int, config: ModelConfig) -> None:
    if not prompt:
        raise DataError(f"prompt {place} is empty; a model needs at least one token, such as BOS")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
        raise DataError(
            f"prompt {place} holds token {wrong}, but the model knows {config.vocab_size} tokens; was it made with "
            "another tokenizer?"
        )
    if len(prompt) + max_new_tokens > config.max_position_embeddings:
        raise DataError(
            f"prompt {place} has {counted(len(prompt), 'token', 'tokens')}; with {max_new_tokens} new ones it does "
            f"not fit into the model's {config.max_position_embeddings} positions{config.positions_advice}"
        )
