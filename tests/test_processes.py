"""Signals: an interrupt while workers start is deferred, not lost; SIGTERM likewise."""

import contextlib
import os
import signal
import threading

import pytest

from megacoder.core.processes import Terminated, interruptible, sigterm_as_interrupt, starting_workers


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


def test_a_handled_sigterm_is_deferred_too():
    reached = []

    def start():
        with sigterm_as_interrupt(), starting_workers():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("end")

    with pytest.raises(Terminated):
        start()
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_first_sigterm_interrupts_and_a_second_does_not_disturb_the_end():
    def end_slowly():
        with sigterm_as_interrupt():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        end_slowly()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("answer", [signal.SIG_IGN, lambda *_: None])
def test_ignored_and_handled_sigterm_stay_so(answer):
    before = signal.signal(signal.SIGTERM, answer)
    try:
        with sigterm_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is answer
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and later, for pytest's own threads
def test_a_forked_process_ends_on_sigterm():
    with sigterm_as_interrupt():
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_an_interrupt_does_not_wait_for_foreign_code():
    told, may_end = [], threading.Event()

    def tell(seconds):
        told.append(seconds)
        if len(told) == 2:
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        interruptible(may_end.wait, tell=tell, every_seconds=0.05)
    may_end.set()
    assert told == sorted(told)
    assert len(told) >= 2


def test_results_and_errors_of_foreign_code_come_back():
    assert interruptible(lambda: 7, tell=print) == 7
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0, tell=print)
