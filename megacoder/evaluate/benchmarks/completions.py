"""Where completions come from without a model in this process: a file of ready ones, or a server that speaks OpenAI's.

A source answers requests in any order. `megacoder.evaluate.benchmarks.local` is the source that runs a model here; this
module imports no torch, so that scoring a file starts at once.
"""

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megacoder.core.errors import ConfigError, DataError, MegacoderError
from megacoder.data.tokenizer import SPECIAL_TOKENS
from megacoder.evaluate.benchmarks.base import Task, read_rows

__all__ = ["CompletionSource", "Decoding", "EndpointError", "EndpointSource", "FileSource", "Request"]

_TRIES = 4
_OPENAI_STOPS = 4
"""Most stop strings that the interface takes; the answer is cut at all of them here anyway."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_new_tokens: int = 512
    chat: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer wanted."""

    task: Task
    sample: int
    stops: tuple[str, ...]
    max_prompt_tokens: int | None = None


class CompletionSource(Protocol):
    """Answers requests."""

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        """(request, text) as they come, once each."""


class EndpointError(MegacoderError):
    """A server that cannot be reached, or does not answer as OpenAI's interface says."""


class FileSource:
    """A JSONL file of `task_id` and `completion`, several lines a task for several samples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._texts: dict[str, list[str]] = defaultdict(list)
        for row in read_rows(path, {"completion": str}):
            if "task_id" not in row:
                raise DataError(f"{path}: a line without task_id: {str(row)[:60]}")
            self._texts[str(row["task_id"])].append(row["completion"])

    def check(self, tasks: Sequence[Task]) -> int:
        """How many samples a task has; DataError where that differs, or tasks are missing or unknown."""
        known = {task.id for task in tasks}
        unknown = next((task_id for task_id in self._texts if task_id not in known), None)
        if unknown is not None:
            raise DataError(f"{self.path}: task_id {unknown!r} is not in the data")
        counts = {task.id: len(self._texts.get(task.id, ())) for task in tasks}
        most = max(counts.values())
        short = next((task_id for task_id, count in counts.items() if count < most), None)
        if short is not None:
            raise DataError(f"{self.path}: {counts[short]} completions of task {short!r}, {most} of others")
        return most

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        for request in requests:
            yield request, self._texts[request.task.id][request.sample]


class EndpointSource:
    """A server with OpenAI's `/v1/completions` or, for chat, `/v1/chat/completions`; vLLM is one."""

    def __init__(
        self, url: str, decoding: Decoding, *, model: str | None = None, workers: int = 8, timeout: float = 600.0
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"--endpoint {url}: expected an address such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        self.decoding, self.workers, self.timeout = decoding, workers, timeout
        self.model = model if model is not None else self._only_model()

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        with ThreadPoolExecutor(self.workers) as pool:
            asked = {pool.submit(self._ask, request): request for request in requests}
            try:
                for done in as_completed(asked):
                    yield asked[done], done.result()
            finally:
                for future in asked:
                    future.cancel()

    def _ask(self, request: Request) -> str:
        decoding, task = self.decoding, request.task
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature,
            "top_p": decoding.top_p, "seed": decoding.seed + request.sample,
        }  # fmt: skip
        if request.stops:
            body["stop"] = list(request.stops[:_OPENAI_STOPS])
        prompt = task.context + task.prompt
        if task.suffix is not None:
            begin, hole, end = (SPECIAL_TOKENS[name] for name in ("fim_begin", "fim_hole", "fim_end"))
            prompt = f"{begin}{prompt}{hole}{task.suffix}{end}"
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
        answer = self._call("/models", None)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EndpointError(f"{self.url}/models: no model in {str(answer)[:120]}; name one (--api-model)") from None

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for left in reversed(range(_TRIES)):
            try:
                request = urllib.request.Request(self.url + path, data=data, headers=headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504) or not left:
                    said = error.read(300).decode("utf-8", "replace")
                    raise EndpointError(f"{self.url}{path}: {error.code} {error.reason}: {said}") from None
            except (OSError, ValueError) as error:
                if not left:
                    reason = getattr(error, "reason", error)
                    raise EndpointError(f"{self.url}{path}: {reason}; is the server running?") from None
            time.sleep(0.5 * 2 ** (_TRIES - 1 - left))
        raise AssertionError("unreachable")
