"""Worker processes: how many, started so that an interrupt never meets one half-started, ended where they cannot end.

A new process reads what to run from a pipe. Were Ctrl-C raised while the parent writes it, the child would find the
pipe cut off and end with a traceback of its own.

SIGTERM can take the way of Ctrl-C, on which a parent ends its workers. Workers themselves keep to what it does to any
process: a pool ends by it those that are left when one was killed.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

__all__ = ["Terminated", "kill_sibling", "num_cores", "sigterm_as_interrupt", "starting_workers"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is answered as Ctrl-C is."""


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raises Terminated at the first SIGTERM in the block; later ones, as `timeout` sends, do not disturb the end.

    Does nothing where SIGTERM is ignored or has been given another answer, nor outside the main thread.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a fork, which ends as others do
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


@contextmanager
def starting_workers() -> Iterator[None]:
    """Holds SIGINT, and a SIGTERM that is answered, back until the block is left; processes started in it are never
    interrupted themselves."""
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


def kill_sibling(pid: int) -> bool:
    """Kills a process that this one's parent started; whether `pid` was such a process, and not another of its number.

    Linux only; elsewhere no process is taken for a sibling.
    """
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold blanks
        if int(fields[1]) == os.getppid():
            os.kill(pid, signal.SIGKILL)
            return True
    return False
