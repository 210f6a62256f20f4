"""An interrupt while workers start is held back, and not lost."""

import os
import signal

import pytest

from megacoder.core.processes import starting_workers


def test_an_interrupt_waits_for_the_end_of_the_block():
    reached = []

    def start():
        with starting_workers():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("end")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
