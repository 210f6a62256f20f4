"""Starting worker processes so that an interrupt never meets one half-started.

A new process reads what to run from a pipe. Were Ctrl-C raised while the parent writes it, the child would find the
pipe cut off and end with a traceback of its own.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["starting_workers"]


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
