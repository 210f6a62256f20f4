"""Ranks for benchmarks: processes that live through the whole run and alternate, idle in between.

A contender is a module with `build(job)`, which returns a function. Each rank of it is this file run as a program: it
joins its contender's process group, builds, and then calls the function with whatever arguments arrive on its standard
input, one line of JSON a call. Between calls it waits for the next line, and costs nothing but memory. So contenders
that cannot share a process (they own torch's default group, or patch torch) still alternate step by step, and a change
in the machine's speed affects all of them.

The program needs torch and the standard library alone: a peer may live in an environment of its own.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn, Self

__all__ = ["Answer", "ContenderFailed", "Ranks"]

ROOT = Path(__file__).resolve().parents[1]
"""What ranks run is the library beside this file, whichever is installed."""


class ContenderFailed(Exception):
    """A contender that cannot run, with the reason in one line."""


@dataclass(frozen=True)
class Answer:
    """What the ranks made of one call."""

    seconds: float
    """from the first rank's start to the last one's end"""
    by_rank: tuple[float, ...]
    """seconds in which each rank was in the call"""
    cpu_by_rank: tuple[float, ...]
    """processor seconds of all its threads; those that wait for each other take none, those that poll do"""
    peak_bytes_by_rank: tuple[int, ...]
    """the most that each rank has held so far, beyond what it held before it built"""
    results: tuple[Any, ...]
    """what each rank returned"""


class Ranks:
    """The processes of one contender; a context manager that leaves none behind."""

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        *,
        size: int,
        python: str = sys.executable,
        backend: str = "gloo",
        threads: int = 1,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Starts `size` processes in which `module` builds from `job`; returns when all have, or ContenderFailed.

        `threads` are each process's for the arithmetic.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self._timeout = timeout_seconds
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        }  # fmt: skip
        store = Path(self._folder.name) / "store"
        self._logs = [Path(self._folder.name) / f"rank-{rank}" for rank in range(size)]
        self._processes = []
        for rank, path in enumerate(self._logs):
            place = {
                "rank": rank, "size": size, "store": str(store), "backend": backend, "module": module,
                "threads": threads,
            }  # fmt: skip
            with path.open("w") as log:
                process = subprocess.Popen(
                    [python, __file__, json.dumps(place), json.dumps(dict(job))],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    env={**os.environ, **environment},
                )  # fmt: skip
            self._processes.append(process)
        self._answers()

    def call(self, **arguments: Any) -> Answer:
        """Calls the function on every rank at once."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(arguments) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                break  # `_answers` says why it is gone
        answers = self._answers()
        begins, ends = [answer["begin"] for answer in answers], [answer["end"] for answer in answers]
        return Answer(
            seconds=max(ends) - min(begins),  # perf_counter is one clock for all processes of a machine
            by_rank=tuple(end - begin for begin, end in zip(begins, ends, strict=True)),
            cpu_by_rank=tuple(answer["cpu"] for answer in answers),
            peak_bytes_by_rank=tuple(answer["peak_bytes"] for answer in answers),
            results=tuple(answer["result"] for answer in answers),
        )

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _answers(self) -> list[dict[str, Any]]:
        """One line from each rank; ContenderFailed as soon as one reports an error, ends or is silent for too long."""
        answers: dict[int, dict[str, Any]] = {}
        pending = {process.stdout: rank for rank, process in enumerate(self._processes) if process.stdout is not None}
        deadline = time.monotonic() + self._timeout
        while pending:
            ready: list[Any] = wait(list[Any](pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"rank {min(pending.values())} did not answer within {self._timeout:.0f} s")
            for pipe in [pipe for pipe in pending if pipe in ready]:
                rank = pending.pop(pipe)
                line = pipe.readline()
                answers[rank] = json.loads(line) if line else {"error": self._last_words(rank)}
                if "error" in answers[rank]:
                    self._fail(answers[rank]["error"])
        return [answers[rank] for rank in range(len(self._processes))]

    def _fail(self, reason: str) -> NoReturn:
        self.stop()
        raise ContenderFailed(reason)

    def _last_words(self, rank: int) -> str:
        lines = [line for line in self._logs[rank].read_text(errors="replace").splitlines() if line.strip()]
        return f"rank {rank} ended: {lines[-1] if lines else 'no word'}"


def _serve(place: dict[str, Any], job: dict[str, Any]) -> None:
    """What a rank does: builds, answers, and ends when nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no answer
    try:
        module = _join(place)
        held = _peak_bytes()
        function = module.build({**job, "rank": place["rank"]})
        print(json.dumps({}), file=answers, flush=True)
        for line in sys.stdin:
            begin, before = time.perf_counter(), time.process_time()
            result = function(**json.loads(line))
            end, cpu = time.perf_counter(), time.process_time() - before
            answer = {"begin": begin, "end": end, "cpu": cpu, "peak_bytes": _peak_bytes() - held, "result": result}
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        traceback.print_exc()
        reason = traceback.format_exception_only(error)[-1].strip()
        print(json.dumps({"error": reason}), file=answers, flush=True)
    os._exit(0)  # a process group whose other ranks are gone may hang on its way out


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _join(place: dict[str, Any]) -> Any:
    """The contender's module, its process group made."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(place["threads"])
    torch.manual_seed(0)
    module = importlib.import_module(place["module"])
    if place["size"] > 1:
        dist.init_process_group(
            place["backend"],
            store=dist.FileStore(place["store"], place["size"]),
            rank=place["rank"],
            world_size=place["size"],
        )
    return module


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
