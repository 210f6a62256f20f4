"""Completions of a model in this process: the library's own, or any that transformers loads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacoder.core.errors import ConfigError
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.control_tokens import infill_text
from megacoder.data.tokenizer import Tokenizer
from megacoder.evaluate.benchmarks.completions import Decoding, Request
from megacoder.evaluate.benchmarks.limits import limited_texts
from megacoder.evaluate.generate import generate
from megacoder.evaluate.prompts import count_with, infill_prompt, sentinels_in
from megacoder.evaluate.stops import StopStrings
from megacoder.model.transformer import Transformer

__all__ = ["LocalSource", "TransformersSource"]


@dataclass(frozen=True, kw_only=True)
class LocalSource:
    """A megacoder model with its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    decoding: Decoding
    format: FormatConfig = FormatConfig()  # noqa: RUF009, it is frozen
    """how `decoding.chat` asks"""
    batch_size: int = 16

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        asked = zip(requests, self._prompts(requests), strict=True)
        prompts = {(request.task.id, request.sample): tokens for request, tokens in asked}
        ordered = sorted(requests, key=lambda request: len(prompts[request.task.id, request.sample]))
        end_id = self.tokenizer.eot_id if self._chat is None else self._chat.end_id
        for first in range(0, len(ordered), self.batch_size):
            batch = ordered[first : first + self.batch_size]
            watching = [StopStrings(self.tokenizer, request.stops) for request in batch]
            generate(
                self.model,
                [prompts[request.task.id, request.sample] for request in batch],
                max_new_tokens=self.decoding.max_new_tokens,
                stop_ids={end_id, *self.tokenizer.end_ids},
                num_ids=self.tokenizer.vocab_size,
                sampling=self.decoding.sampling,
                batch_size=self.batch_size,
                names=[f"{request.task.id}/{request.sample}" for request in batch],
                watcher=lambda place, tokens, watching=watching: watching[place].add(tokens[-1]),  # type: ignore[misc]
            )
            for request, watched in zip(batch, watching, strict=True):
                yield request, watched.finish()

    @property
    def _chat(self) -> ChatFormat | None:
        return ChatFormat(self.format, self.tokenizer) if self.decoding.chat else None

    def _prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        tokenizer, chat = self.tokenizer, self._chat
        room = self.model.config.max_position_embeddings - self.decoding.max_new_tokens
        if room < 8:
            raise ConfigError(
                f"{self.decoding.max_new_tokens} new tokens leave no room for a prompt in the model's "
                f"{self.model.config.max_position_embeddings} positions; lower --max-new-tokens"
            )
        sides = [(request.task.prompt, request.task.suffix) for request in requests if request.task.suffix is not None]
        if sides:
            return [
                infill_prompt(tokenizer, before, after, max_tokens=room, spm=self.decoding.spm).tokens
                for before, after in sides
            ]
        frame = 1 if chat is None else len(chat.prompt([("user", "")]))
        texts = limited_texts(requests, count=count_with(tokenizer), frame=frame, room=room)
        if chat is not None:
            return [chat.prompt([("user", text)]) for text in texts]
        return [[*tokenizer.beginning, *tokenizer.encode(text)] or [tokenizer.eos_id] for text in texts]


class TransformersSource:
    """A Hugging Face folder of any architecture, run by transformers; one request at a time."""

    def __init__(self, folder: Path, decoding: Decoding, *, device: str) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ConfigError(
                f"{folder}: not a megacoder model; to load it with transformers, pip install 'megacoder[hf]'"
            ) from None
        self.decoding, self.device = decoding, device
        loader: Any = AutoModelForCausalLM
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.model: Any = loader.from_pretrained(folder, dtype="auto").to(device).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        texts = limited_texts(requests, count=self._sizes, frame=len(self._tokens("")))
        for request, text in zip(requests, texts, strict=True):
            yield request, self._one(request, text)

    def _sizes(self, texts: Sequence[str]) -> list[int]:
        return [len(tokens) for tokens in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def _tokens(self, text: str) -> list[int]:
        if not self.decoding.chat:
            return list(self.tokenizer(text)["input_ids"])
        said = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False))

    @torch.inference_mode()
    def _one(self, request: Request, text: str) -> str:
        chosen, task = self.decoding.sampling, request.task
        if task.suffix is not None:
            sentinels = sentinels_in(self.tokenizer.get_vocab(), whose="the model's tokenizer")
            text = infill_text(text, task.suffix, sentinels, spm=self.decoding.spm)
        ids = torch.tensor([self._tokens(text)], device=self.device)
        drawing: dict[str, Any] = {"do_sample": chosen.temperature > 0}
        if chosen.temperature > 0:
            torch.manual_seed(chosen.seed * 1_000_003 + request.sample)
            drawing |= {"temperature": chosen.temperature, "top_p": chosen.top_p, "top_k": chosen.top_k or None}
        stopping: dict[str, Any] = {}
        if request.stops:
            stopping = {"stop_strings": list(request.stops), "tokenizer": self.tokenizer}
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.decoding.max_new_tokens, pad_token_id=padding,
            **drawing, **stopping,
        )  # fmt: skip
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
