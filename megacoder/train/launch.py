"""Starting torchrun from inside: `megacoder train RUN.toml --nproc 2` is `torchrun --nproc-per-node 2 -m megacoder ...`

torchrun's own launcher is called as a library, so that a worker's failure ends in one line here and not in a report of
the launcher's innards: the worker has already said what was wrong.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from megacoder.core.errors import MegacoderError

__all__ = ["WorkerFailed", "how_it_ended", "launch_workers"]

PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""Signals that torchrun forwards to its ranks by itself."""


class WorkerFailed(MegacoderError):
    """A rank ended with an error, which it has printed itself."""


def launch_workers(arguments: Sequence[str], *, nproc: int, stop_signals: Sequence[str] = ()) -> None:
    """Runs `python -m megacoder ARGUMENTS` on `nproc` ranks of this machine and waits for them.

    If this process receives one of `stop_signals`, the ranks are sent it too.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    signals = dict.fromkeys([*PASSED_ON, *stop_signals])
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # set by nohup
        del signals["SIGHUP"]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, max_restarts=0, monitor_interval=0.1,
        run_id="megacoder", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="spawn",
        signals_to_handle=",".join(signals),
    )  # fmt: skip
    answers = {name: signal.getsignal(getattr(signal, name)) for name in signals}
    try:
        elastic_launch(config, entrypoint=sys.executable)("-m", "megacoder", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        failed = WorkerFailed(f"rank {rank} of {nproc} ended with {how_it_ended(failure.exitcode)}")
        failed.exit_code = failure.exitcode if failure.exitcode > 0 else 1
        raise failed from None
    except SignalException as error:
        is_interrupt = error.sigval in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        code = 128 + error.sigval if is_interrupt else 0
        raise SystemExit(code) from None
    finally:  # torchrun leaves its own handlers behind, as its process would end here
        for name, answer in answers.items():
            signal.signal(getattr(signal, name), answer)


def how_it_ended(exit_code: int) -> str:
    """What a rank's exit code says to the person who started it."""
    if exit_code >= 0:
        return f"exit code {exit_code}; its own message is above"
    name = signal.Signals(-exit_code).name
    if name == "SIGBUS":  # data and checkpoint files are memory-mapped: a failed read arrives as a signal
        return f"{name}; a file was truncated while it was read, or its disk has failed"
    return f"{name}; if nobody sent it, the machine may have run out of memory"
