"""A rank that fails: `faulty_worker.py FAULT RANK STEP PLACE ARGUMENTS...` is `python -m megacoder ARGUMENTS...`, but
FAULT happens on that rank, or on `every` rank, when its journal is at that step and place ('forward 2', 'reading
data').
"""

import ctypes
import os
import signal
import sys
import time

from megacoder.core.errors import DataError
from megacoder.parallel.journal import Journal


def fail():
    raise DataError("the disk is gone")


def block_in_c():
    """Waits as in cudaStreamSynchronize: without the GIL, and without returning to Python on a signal."""
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill, others blocked": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill, others asked late": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill, disk hangs": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stall": lambda: time.sleep(1000),
    "stall unnoticed": lambda: time.sleep(1000),
    "fail": fail,
}


def arm(fault, rank, step, place):
    activity, _, microbatch = place.rpartition(" ") if place[-1].isdigit() else (place, "", None)
    note = Journal.at

    def at(self, activity_now, microbatch_now=None):
        note(self, activity_now, microbatch_now)
        here = (self.step == int(step), activity_now == activity, str(microbatch_now) == str(microbatch))
        if rank in (os.environ["RANK"], "every") and all(here):
            time.sleep(6.0 if "blocked" in fault else 2.5)  # a few beats, so that the others have seen it here
            FAULTS[fault]()
        elif fault == "kill, others blocked" and all(here):
            block_in_c()

    Journal.at = at


def never_fail():
    """Collectives wait for ever, as NCCL's do."""
    from megacoder.train import setup

    start_world = setup.start_world
    setup.start_world = lambda device_type, **settings: start_world(device_type, **{**settings, "timeout_seconds": 1e3})


def ask_late():
    """torchrun's SIGTERM arrives between the run's end and the watch's."""
    from megacoder.train.loop import Trainer

    run = Trainer.run

    def run_and_ask(self):
        try:
            run(self)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.run = run_and_ask


def never_write():
    """The disk takes longer for the flight record than torchrun waits."""
    from megacoder.parallel import watch

    watch.write_text = lambda path, text: time.sleep(1000)


if __name__ == "__main__":
    from megacoder.cli.main import main

    arm(*sys.argv[1:5])
    if "asked late" in sys.argv[1]:
        ask_late()
    if "disk hangs" in sys.argv[1]:
        never_write()
    if sys.argv[1] == "stall unnoticed":
        never_fail()
    main(sys.argv[5:])
