"""Worker processes: how many, started so that an interrupt never meets one half-started, ended where they cannot end.

A new process reads what to run from a pipe. Were Ctrl-C raised while the parent writes it, the child would find the
pipe cut off and end with a traceback of its own.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

__all__ = ["kill_sibling", "num_cores", "starting_workers"]


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def starting_workers() -> Iterator[None]:
    """Holds SIGINT back until the block is left; processes started in it are never interrupted themselves."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is ever interrupted
        yield
        return
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    handler = signal.signal(signal.SIGINT, remember)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit this
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            handler(signal.SIGINT, None)


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
