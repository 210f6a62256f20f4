"""Shard tasks on this machine's cores: one pool of processes for a whole build; none of them outlives a parent that is
killed.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megacoder.core.errors import CorpusError
from megacoder.core.processes import begin_worker, num_cores, starting_workers

__all__ = ["WorkerPool"]

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerPool:
    """Up to `workers` processes (None: one per core), started when first needed, stopped when the `with` block ends."""

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        """as given: None leaves the number to the engine"""
        self._processes: ProcessPoolExecutor | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._processes is not None:
            self._processes.shutdown(wait=True, cancel_futures=True)

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], *, done: Callable[[Task], Any]
    ) -> list[Result]:
        """The results of `function(task)` in the order of `tasks`; `done(task)` is called as each one ends.

        Tasks start in the order given, so callers put long ones first. The first error stops the run; CorpusError if a
        worker is killed.
        """
        workers = self.workers or num_cores()
        if min(workers, len(tasks)) <= 1:
            results = []
            for task in tasks:
                results.append(function(task))
                done(task)
            return results
        if self._processes is None:  # spawned, not forked: the parent may run the progress bar's thread
            self._processes = ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker
            )
        try:
            with starting_workers():
                futures = {self._processes.submit(function, task): place for place, task in enumerate(tasks)}
            for future in as_completed(futures):
                future.result()
                done(tasks[futures[future]])
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise CorpusError(
                "a worker process was killed, most likely out of memory; run the same command with fewer --workers"
            ) from None
