"""Shard tasks on this machine's cores: a process pool that leaves nothing behind when its parent is killed."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megacoder.core.errors import CorpusError
from megacoder.core.processes import num_cores, starting_workers

__all__ = ["run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int, done: Callable[[Task], Any]
) -> list[Result]:
    """The results of `function(task)` in the order of `tasks`; `done(task)` is called as each one ends.

    `workers` of 0 means one per core. Tasks start in the order given, which puts long ones first if the caller does.
    The first error stops the run; CorpusError if a worker is killed.
    """
    workers = min(workers or num_cores(), len(tasks))
    if workers <= 1:
        results = []
        for task in tasks:
            results.append(function(task))
            done(task)
        return results
    # spawned, not forked: the parent may run the progress bar's thread
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        with starting_workers():
            futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            done(futures[future])
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise CorpusError(
            "a worker process was killed, most likely for memory; run the same command with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker waits for work forever if its parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
