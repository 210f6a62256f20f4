"""Worker processes: how many, started so that an interrupt never finds one half-started, and killed when stuck.

A new process reads what to run from a pipe. If Ctrl-C were raised while the parent writes to it, the child would find
the pipe cut off and end with a traceback of its own.

A parent can handle SIGTERM like Ctrl-C, and so end its workers. Workers themselves keep its default action: a pool
sends it to those that are left when one was killed.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

__all__ = [
    "Terminated", "begin_worker", "interruptible", "kill_sibling", "num_cores", "sigterm_as_interrupt",
    "starting_workers",
]  # fmt: skip


T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is handled like Ctrl-C."""


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raises Terminated at the first SIGTERM in the block; later ones, as `timeout` sends, are ignored.

    Does nothing if SIGTERM is ignored or has another handler, or outside the main thread.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a fork, which ends by the default action
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interruptible(work: Callable[[], T], *, tell: Callable[[float], None], every_seconds: float = 10.0) -> T:
    """Runs `work`, a long call of foreign code that releases Python's lock, so that Ctrl-C is answered at once.

    It runs in a thread of its own, which an interrupt leaves behind: it ends with the process, so `work` must not write
    anything. `tell` is given the seconds passed, at intervals.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    start = time.monotonic()
    threading.Thread(target=run, daemon=True).start()
    while not ended.wait(every_seconds):
        tell(time.monotonic() - start)
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def starting_workers() -> Iterator[None]:
    """Holds SIGINT, and SIGTERM if it has a handler, back until the block is left; processes started in it never get
    SIGINT."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is ever interrupted
        yield
        return
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    handlers = {signal.SIGINT: signal.signal(signal.SIGINT, remember)}
    if callable(answer := signal.getsignal(signal.SIGTERM)):
        handlers[signal.SIGTERM] = answer
        signal.signal(signal.SIGTERM, remember)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit this
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for first in map(signal.Signals, received):
            if callable(handler := handlers[first]):
                handler(first, None)
                break


def begin_worker() -> None:
    """What a process of a pool does first: Ctrl-C is left to the parent, which stops its workers, and the process exits
    when the parent is killed, whatever it waits for; it would otherwise wait for work forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    from multiprocessing import parent_process  # loaded in a worker; takes 20 ms of every other command's start

    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def kill_sibling(pid: int) -> bool:
    """Kills process `pid` if this one's parent started it, rather than a later process of the same number; whether so.

    Linux only; elsewhere no process is taken for a sibling.
    """
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold blanks
        if int(fields[1]) == os.getppid():
            os.kill(pid, signal.SIGKILL)
            return True
    return False
