"""Ends a run that has lost a rank, on every host, within the time-out, with a line that names the rank.

A rank that waits for a dead one learns little by itself: gloo says that a connection was closed, NCCL says nothing at
all. So while a run lasts each rank has two threads. One leaves a Record on the run's bulletin every beat, and looks
whether the end has been announced there. The other touches no network, and so cannot hang: it ends the process when
the main thread does not.

When a collective fails, or does not end in time, the rank compares the records of all ranks (`megacoder.parallel.
blame`) and announces what it found; the first announcement stands, and each host prints it once. A rank that cannot
reach the bulletin says that, and what it waited for. The cost is three small messages per rank and beat.

A rank whose launcher has been killed asks itself to stop, as a signal would: with a checkpoint, on all ranks alike.

Ends by force, once the line is out: a rank of this host that is stopped (torchrun would wait half a minute for it), and
torchrun itself on a host that is cut off (with a c10d rendezvous it, too, asks the lost store, for ever).

What this cannot see: a main thread that holds Python's lock for ever stops its threads as well; to the others it is a
rank that does not answer.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from megacoder.core.console import say
from megacoder.core.errors import AlikeOnAllRanks, RankLost
from megacoder.core.files import write_text
from megacoder.core.processes import kill_sibling
from megacoder.parallel.blame import Record, find_loss
from megacoder.parallel.bulletin import Bulletin, End
from megacoder.parallel.collectives import World, flight_record
from megacoder.parallel.journal import CHECKPOINT

__all__ = ["Watch"]

GRACE_SECONDS = 3.0
"""How long after the announcement a rank may take to end by itself."""
ANSWER_SECONDS = 5.0
"""A store that takes longer than this to answer does not answer."""
OUT_OF_TOUCH_SECONDS = 60.0
"""A store that does not answer for so long, and for longer than the time-out, ends a rank that waits for nobody."""
PACKAGE = str(Path(__file__).parent.parent) + os.sep


class Watch:
    """A context manager around the run of one rank; raises RankLost in place of the failure that it explains."""

    def __init__(self, world: World, *, timeout_seconds: float, folder: Path) -> None:
        """`folder` gets the flight record of each rank that was there at the end, if torch has one."""
        self._world, self._journal, self._folder = world, world.journal, folder
        self._timeout = timeout_seconds
        self._interval = min(2.0, max(0.2, timeout_seconds / 10))
        self._margin = min(10.0, max(2.0, timeout_seconds / 4))
        self._patience = max(3.0, 3 * self._interval)  # within it every rank that lives has published
        self._host = socket.gethostname()
        self._num_hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if self._num_hosts > 1:  # containers often share a name
            self._host += f", node {os.environ['GROUP_RANK']}"
        self._main, self._agent = threading.get_ident(), os.getppid()
        self._active = world.size > 1 and "MASTER_ADDR" in os.environ  # else there is nobody, or nowhere, to ask
        self._bulletin = Bulletin(world.size, world.attempt)
        self._heard = time.monotonic()
        self._end: End | None = None
        self._over, self._failed = threading.Event(), False
        self._threads: list[threading.Thread] = []
        self._beat = 0
        self._moves, self._moved = -1, time.monotonic()

    def __enter__(self) -> Self:
        if self._active:
            for target in (self._keep_beating, self._guard):
                self._threads.append(threading.Thread(target=target, name=target.__name__, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        try:
            if isinstance(error, RankLost):
                self._failed = True
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which must not come before the line
                raise self._conclude(str(error)) from error
            if isinstance(error, Exception) and not isinstance(error, AlikeOnAllRanks):
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
                self._announce(f"{self._record().name()} failed: {said}")
            elif error is None:
                self._bulletin.ask(lambda: self._publish(finished=True), seconds=ANSWER_SECONDS)
        finally:
            self._over.set()
            for thread in self._threads:  # one that came back from the network while Python ends would abort it
                thread.join(ANSWER_SECONDS)

    # ---- the two threads

    def _keep_beating(self) -> None:
        """Blocks where the network does, which `_heard` shows to the other thread."""
        while not self._over.is_set():
            with contextlib.suppress(RuntimeError):
                self._bulletin.connect(self._timeout)
                self._publish()
                self._end = self._end or self._bulletin.announced()
                self._heard = time.monotonic()
            self._over.wait(self._interval)

    def _guard(self) -> None:
        """Ends the process when the main thread hangs in the network, or the run is over and it goes on."""
        ended: float | None = None
        has_agent = "TORCHELASTIC_RUN_ID" in os.environ  # else a shell, which may go
        while not self._over.wait(self._interval):
            if has_agent and os.getppid() != self._agent:  # killed: nobody is left who could end this rank
                has_agent = False
                say(f"rank {self._world.rank}: torchrun has ended; the rank stops as if asked to")
                os.kill(os.getpid(), signal.SIGTERM)
            now, still = time.monotonic(), self._still_seconds()
            if self._end is not None:
                ended = ended or now
                if now - ended > GRACE_SECONDS:
                    self._leave(self._tell(self._end))
            elif self._failed:  # the main thread is about to say why
                continue
            elif (self._may_hang() and still > self._timeout + self._margin) or (
                self._journal.stop_asked and still > self._patience and self._someone_is_silent()
            ):
                self._leave(self._conclude(f"{self._journal.operation} did not end in {still:.0f} s"))
            elif now - self._heard > max(OUT_OF_TOUCH_SECONDS, self._timeout + self._margin):
                self._leave(self._cut_off("out of touch"))

    def _may_hang(self) -> bool:
        """Whether the main thread may be waiting for other ranks: on a GPU that is any place that waits for the GPU."""
        journal = self._journal
        on_gpu = self._world.device.type == "cuda" and journal.step is not None and journal.activity != CHECKPOINT
        return journal.waiting or on_gpu

    def _someone_is_silent(self) -> bool:
        """Torchrun asks the ranks to stop when one has died, which some do not notice: those that wait for it with
        NCCL, or for its file of a checkpoint."""
        looks = self._bulletin.ask(
            lambda: self._bulletin.two_looks(self._patience), seconds=self._patience + ANSWER_SECONDS
        )
        if looks is None:
            return False
        before, after = looks
        return any(after[rank].beat == before[rank].beat and not after[rank].finished for rank in before)

    def _leave(self, error: RankLost) -> None:
        self._print(error)
        os._exit(error.exit_code)

    # ---- finding out and telling

    def _conclude(self, failure: str) -> RankLost:
        """What to raise or print after `failure`: the announcement that stands, made by this rank if there is none."""
        looks = self._bulletin.ask(
            lambda: self._bulletin.two_looks(self._patience), seconds=self._patience + ANSWER_SECONDS
        )
        flight = self._save_flight_record()
        if looks is None:
            return self._cut_off(failure + flight)
        loss = find_loss(self._record(), failure, *looks, size=self._world.size, now=time.time())
        line = loss.line + flight
        end = self._announce(line, [(record.host, record.pid) for record in loss.silent])
        if end is None:
            return self._cut_off(failure + flight)
        if (end.line, end.host) == (line, self._host):
            self._end_silent(end)
            return RankLost(line)
        return self._tell(end)

    def _announce(self, line: str, silent: list[tuple[str, int]] | None = None) -> End | None:
        end = End(line=line, host=self._host, silent=silent or [])
        return self._bulletin.ask(lambda: self._bulletin.announce(end), seconds=ANSWER_SECONDS)

    def _tell(self, end: End) -> RankLost:
        """The announcement as this rank's error; on a host where nobody has printed it yet, this rank does."""
        self._end_silent(end)
        told = end.host == self._host
        if not told:
            told = self._bulletin.ask(lambda: self._bulletin.claim(self._host), seconds=ANSWER_SECONDS) is False
        return RankLost(end.line, told=told)

    def _cut_off(self, failure: str) -> RankLost:
        """For a rank that reaches nobody."""
        record, address = self._record(), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        error = RankLost(
            f"{record.name()} at {record.place}: {failure}; the store at {address} does not answer either: its host is "
            "down or the network is cut"
        )
        if self._num_hosts > 1:
            self._print(error)
            error.told = True
            self._end_agent()
        return error

    def _print(self, error: RankLost) -> None:
        if not error.told:
            say(f"megacoder: {error}")

    # ---- ending processes that cannot end

    def _end_silent(self, end: End) -> None:
        for host, pid in end.silent:
            if host == self._host:
                kill_sibling(pid)

    def _end_agent(self) -> None:
        """Asks torchrun to end, and makes it where it does not hear."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which a torchrun that hears sends to its ranks
        for number in (signal.SIGTERM, signal.SIGKILL):
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == self._agent:
                with contextlib.suppress(OSError):
                    os.kill(self._agent, number)
                time.sleep(GRACE_SECONDS if number == signal.SIGTERM else 0.0)

    # ---- this rank

    def _publish(self, *, finished: bool = False) -> None:
        self._beat += 1
        self._bulletin.publish(self._record(finished=finished))

    def _record(self, *, finished: bool = False) -> Record:
        journal, still = self._journal, self._still_seconds()
        return Record(
            rank=self._world.rank, host=self._host, pid=os.getpid(), beat=self._beat, time=time.time(),
            step=journal.step, microbatch=journal.microbatch, moves=journal.moves, place=journal.place(),
            operation=None if journal.operation is None else str(journal.operation), waiting=journal.waiting,
            still_seconds=still, where=_where(self._main), finished=finished,
        )  # fmt: skip

    def _still_seconds(self) -> float:
        """Since the main thread was last seen to move."""
        if self._journal.moves != self._moves:
            self._moves, self._moved = self._journal.moves, time.monotonic()
        return time.monotonic() - self._moved

    def _save_flight_record(self) -> str:
        """Writes it into the run's folder; the words that say so, if there is one."""
        record, path = flight_record(), self._folder / "flight" / f"rank-{self._world.rank:05d}.json"
        if record is not None and self._folder.is_dir():
            with contextlib.suppress(OSError):
                write_text(path, record.decode())
                return f"; torch's flight records are in {path.parent}"
        return ""


def _where(thread: int) -> str:
    """The innermost line of this package at which a thread is, as 'stage.py:44 in forward_backward'."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""
