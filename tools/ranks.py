"""Gloo ranks for tests and tools: one pool of processes for the whole session, a process group of its own per call.

A function of a module that can be imported runs on some ranks and its results come back, all of it pickled.
A call costs 0.05 s on 2 to 4 ranks, where starting processes costs seconds: they are forked from a server that has
imported torch, and stay. What one test leaves behind (a group, a hung collective) must not reach the next: each call
makes its own default process group, and after any failure the processes are killed and the next call forks others.

Groups meet through a file, not a TCP store: torch looks up the name of each address that a store's client connects to,
and where name servers do not answer that takes five seconds a time.
"""

import datetime
import faulthandler
import functools
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from megacoder.core.processes import begin_worker
from megacoder.parallel.world import World

__all__ = ["Outcome", "RankFailed", "RankPool", "fork_server"]

MAX_RANKS = 16
GRACE_SECONDS = 0.2
"""How long after one rank's failure others may still report theirs; then the call is over."""


class RankFailed(AssertionError):
    """A rank raised, died or hung; the text says which, and what the others were doing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one rank of a call."""

    result: Any = None
    """what the function returned"""
    failure: str | None = None
    """None where it returned; else a line that says what happened, and the traceback if it raised"""
    exit_code: int | None = None
    """of a process that ended during the call: negative for a signal"""


class RankPool:
    """Runs functions on gloo ranks; a context manager that leaves no process behind."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._num_calls = itertools.count()

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 150.0) -> list[Any]:
        """[function(world, *args) of rank 0, of rank 1, ...]; RankFailed as soon as one of them fails."""
        outcomes = self._call(size, function, args, timeout_seconds, patient=False)
        failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.failure is not None}
        if failed:
            first = min(failed, key=lambda rank: failed[rank].exit_code is None)  # a death explains other failures
            title = f"rank {first} of {size} failed in {function.__qualname__}"
            raise RankFailed("\n".join([title, *(f"rank {rank} {failed[rank].failure}" for rank in failed)]))
        return [outcomes[rank].result for rank in range(size)]

    def run_apart(
        self, size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 150.0
    ) -> list[Outcome]:
        """As `run`, but on processes of this call alone, which it may kill; what became of every rank, in order."""
        with RankPool() as pool:
            outcomes = pool._call(size, function, args, timeout_seconds, patient=True)
        return [outcomes[rank] for rank in range(size)]

    def stop(self) -> None:
        """Kills the processes; the next call forks others."""
        for rank in self._ranks:
            rank.kill()
        self._ranks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def _call(
        self, size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout_seconds: float, *, patient: bool
    ) -> dict[int, Outcome]:
        """Outcomes in the order in which they came; `patient` waits for all ranks although one has failed."""
        if not 1 <= size <= MAX_RANKS:
            raise ValueError(f"{size} ranks: a pool has 1 to {MAX_RANKS}")
        task = pickle.dumps((function, args))
        store = str(self._folder / f"store-{next(self._num_calls)}")
        whole = False
        try:
            while len(self._ranks) < size:
                self._ranks.append(_Rank(self._folder / f"stack-{len(self._ranks)}"))
            for index in range(size):
                self._ranks[index].send((store, index, size, timeout_seconds), task)
            outcomes = self._collect(size, timeout_seconds, patient=patient)
            whole = all(outcome.failure is None for outcome in outcomes.values())
            return outcomes
        finally:
            if not whole:
                self.stop()

    def _collect(self, size: int, timeout_seconds: float, *, patient: bool) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        pending: dict[Any, int] = {rank.connection: index for index, rank in enumerate(self._ranks[:size])}
        deadline = time.monotonic() + timeout_seconds
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                index = pending.pop(connection)
                outcomes[index] = self._ranks[index].outcome()
                if outcomes[index].failure is not None and not patient:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for index in pending.values():
            outcomes[index] = Outcome(failure=f"had not answered; it was in {self._ranks[index].whereabouts()}")
        return outcomes


class _Rank:
    """One process of a pool, as its owner sees it."""

    def __init__(self, stack_path: Path) -> None:
        self._stack_path = stack_path
        stack_path.write_text("")
        self.connection, theirs = multiprocessing.Pipe()
        self._process = fork_server().Process(target=_serve, args=(theirs, stack_path), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, place: tuple[str, int, int, float], task: bytes) -> None:
        self.connection.send(place)
        self.connection.send_bytes(task)

    def outcome(self) -> Outcome:
        """Reads the answer that is there, or learns how the process ended."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return Outcome(failure=f"ended with {cause}", exit_code=code)

    def whereabouts(self) -> str:
        """The Python frames of a rank that does not answer, innermost first, in one line."""
        os.kill(self._process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 2.0
        while "in _serve\n" not in (stack := self._stack_path.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)  # the handler writes frame by frame, innermost first
        frames: list[str] = []
        for path, line, name in re.findall(r'File "(.+)", line (\d+) in (\S+)', stack):
            if path == __file__:
                break
            if not frames or "/torch/" not in path:  # of torch, the innermost frame says enough
                frames.append(f"{name} ({Path(path).name}:{line})")
        return " < ".join(frames) or "no Python code that it could tell of"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


@functools.cache
def fork_server() -> Any:
    """The multiprocessing context whose processes are forked from one that has imported what ranks need."""
    context = multiprocessing.get_context("forkserver")
    tests = ["pytest"] if "pytest" in sys.modules else []
    context.set_forkserver_preload([*tests, "megacoder.train.engine"])
    return context


def _serve(connection: Connection, stack_path: Path) -> None:
    """What a rank's process does until its owner closes the pipe or ends."""
    begin_worker()
    with stack_path.open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        while True:
            try:
                place, task = connection.recv(), connection.recv_bytes()
            except EOFError:
                return
            store, rank, size, timeout_seconds = place
            connection.send_bytes(_answer(store, rank, size, timeout_seconds, task))


def _answer(store: str, rank: int, size: int, timeout_seconds: float, task: bytes) -> bytes:
    """Runs one call on this rank: a pickled Outcome."""
    try:
        if dist.is_initialized():  # the last call's; by now all of its ranks have answered, none waits for another
            dist.destroy_process_group()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=2 * timeout_seconds),  # the pool's own time-out comes first
        )
        function, args = pickle.loads(task)
        result = function(World(rank, size, rank, torch.device("cpu"), dist.group.WORLD), *args)
        return pickle.dumps(Outcome(result=result))
    except BaseException as error:
        line = traceback.format_exception_only(error)[-1].strip()
        return pickle.dumps(Outcome(failure=f"raised {line}\n{traceback.format_exc()}"))
