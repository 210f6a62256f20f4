"""Completions of a server that speaks OpenAI's interface, such as vLLM's."""

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tokenizers

from megacoder.core.console import say_once
from megacoder.core.errors import ConfigError, MegacoderError
from megacoder.data.control_tokens import infill_text, sentinels_among
from megacoder.evaluate.benchmarks.completions import Decoding, Request
from megacoder.evaluate.benchmarks.limits import certainly_fits, limited_texts, num_bytes
from megacoder.evaluate.prompts import CountTokens, sentinels_in

__all__ = ["EndpointError", "EndpointSource"]

_TRIES = 4
_MODELS_SECONDS = 20.0
"""How long a server may take to list its models, which needs no computation."""
_BOS = 1
"""Tokens that a server puts in front; those of its chat template are not known here."""
_ANSWER_SECONDS = 600.0
"""How long an answer may take."""
_OPENAI_STOPS = 4
"""Most stop strings that the interface accepts; the answer is cut at all of them here anyway."""


class EndpointError(MegacoderError):
    """A server that cannot be reached, or does not answer as OpenAI's interface specifies."""


class EndpointSource:
    """A server with OpenAI's `/v1/completions` or, for chat, `/v1/chat/completions`; vLLM is one."""

    def __init__(
        self, url: str, decoding: Decoding, *, model: str | None = None, tokenizer: Path | None = None,
        workers: int = 8,
    ) -> None:  # fmt: skip
        """`tokenizer` is a folder with the model's tokenizer.json. Only prompts near a limit need it, and infilling by
        a model whose sentinels are not DeepSeek-Coder's."""
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is not a number
            known = False
        if not known:
            raise ConfigError(f"--endpoint {url}: expected an address such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        self.decoding, self.workers = decoding, workers
        backend = None if tokenizer is None else _read_tokenizer(tokenizer)
        self._count = None if backend is None else _count_with(backend)
        self._vocabulary = None if backend is None else backend.get_vocab()
        self.model = model if model is not None else self._only_model()

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        texts = self._texts(requests)
        if any(request.task.suffix is not None for request in requests):
            texts = self._around_holes(requests, texts)
        with ThreadPoolExecutor(self.workers) as pool:
            asked = {
                pool.submit(self._ask, request, text): request for request, text in zip(requests, texts, strict=True)
            }
            try:
                for done in as_completed(asked):
                    yield asked[done], done.result()
            finally:
                for future in asked:
                    future.cancel()

    def _around_holes(self, requests: Sequence[Request], texts: Sequence[str]) -> list[str]:
        """`texts`, with the marks of fill-in-the-middle where a request has a suffix."""
        sentinels, spm = self._known_sentinels(), self.decoding.spm
        suffixes = [request.task.suffix for request in requests]
        return [
            text if suffix is None else infill_text(text, suffix, sentinels, spm=spm)
            for text, suffix in zip(texts, suffixes, strict=True)
        ]

    def _known_sentinels(self) -> Mapping[str, str]:
        if self._vocabulary is not None:
            return sentinels_in(self._vocabulary, whose="the tokenizer of --tokenizer")
        usual = sentinels_among(())
        say_once(
            f"{self.url}: asked to fill in with {' '.join(usual.values())}; give the folder of the model's "
            "tokenizer.json (--tokenizer) if it has others"
        )
        return usual

    def _texts(self, requests: Sequence[Request]) -> list[str]:
        """Prompts within their limits; ConfigError where that takes a tokenizer and there is none."""
        if self._count is None:
            long = next((request for request in requests if not certainly_fits(request, frame=_BOS)), None)
            if long is not None:
                raise ConfigError(
                    f"task {long.task.id!r}: its prompt may exceed the published limit of {long.max_prompt_tokens:,} "
                    "tokens, or its context that of 512; give the folder of the model's tokenizer.json to count them "
                    "(--tokenizer)"
                )
        return limited_texts(requests, count=self._count or num_bytes, frame=_BOS)

    def _ask(self, request: Request, prompt: str) -> str:
        decoding, sampling = self.decoding, self.decoding.sampling
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": decoding.max_new_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": sampling.seed + request.sample,
        }  # fmt: skip
        if request.stops:
            body["stop"] = list(request.stops[:_OPENAI_STOPS])
        if decoding.chat:
            answer = self._call("/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]})
        else:
            answer = self._call("/completions", body | {"prompt": prompt})
        try:
            choice = answer["choices"][0]
            return str(choice["message"]["content"] or "") if decoding.chat else str(choice["text"])
        except (KeyError, IndexError, TypeError):
            raise EndpointError(f"{self.url}: no completion in its answer {str(answer)[:120]}") from None

    def _only_model(self) -> str:
        answer = self._call("/models", None, timeout=_MODELS_SECONDS)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EndpointError(f"{self.url}/models: no model in {str(answer)[:120]}; name one (--api-model)") from None

    def _call(self, path: str, body: dict[str, Any] | None, *, timeout: float = _ANSWER_SECONDS) -> Any:
        """The answer's JSON; retries where the server is busy or down, but not after a timeout."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for left in reversed(range(_TRIES)):
            try:
                request = urllib.request.Request(self.url + path, data=data, headers=headers)
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504) or not left:
                    said = error.read(300).decode("utf-8", "replace")
                    raise EndpointError(f"{self.url}{path}: {error.code} {error.reason}: {said}") from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    raise EndpointError(
                        f"{self.url}{path}: no answer in {timeout:.0f} s; is an OpenAI-compatible server running there?"
                    ) from None
                if not left:
                    what = str(reason).strip() or type(reason).__name__
                    raise EndpointError(f"{self.url}{path}: {what}; is the server running?") from None
            time.sleep(0.5 * 2 ** (_TRIES - 1 - left))
        raise AssertionError("unreachable")


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """That of any model; ConfigError where there is none."""
    try:
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"--tokenizer {folder}: no tokenizer.json that can be read: {error}") from None


def _count_with(backend: tokenizers.Tokenizer) -> CountTokens:
    return lambda texts: [len(found.ids) for found in backend.encode_batch(list(texts), add_special_tokens=False)]
