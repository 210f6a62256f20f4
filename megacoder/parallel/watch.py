"""Stops a run that has lost a rank, on every host, within the time-out, with a line that names the rank.

A rank that waits for a dead one learns little by itself: gloo says that a connection was closed, NCCL says nothing at
all. So each rank of a run has two threads. One writes a Record to the run's bulletin every beat, and checks whether the
end has been announced there. The other never touches the network, and so cannot hang: it exits the process if the main
thread does not.

When a collective fails or times out, the rank compares the records of all ranks (`megacoder.parallel.blame`) and
announces what it found; the first announcement counts, and each host prints it once. A rank that cannot reach the
bulletin reports that, and what it waited for. The cost is three small messages per rank and beat.

torchrun asks all ranks to stop 0.1 s after one has died, and kills them 30 s later. The line is out by then: a training
loop that has failed ignores the request; every wait is bounded, that for the disk too, 27 s together if each takes as
long as it may; and whoever announces or claims the line prints it before any thread may end the process. Before the
loop the request ends a rank at once: if it comes before the rank has noticed the loss, only torchrun names the rank.

A rank whose launcher has been killed sends itself a stop signal: all ranks then stop together, with a checkpoint.
Python runs no signal handler while the main thread waits for its GPU; so signals also arrive at a socket, which the
second thread reads.

Killed by force, once the line is printed: a suspended rank on this host (torchrun would wait half a minute for it), and
torchrun itself on a host that is cut off (with a c10d rendezvous it, too, would query the lost store forever).

What this cannot see: a main thread that holds the GIL forever blocks its own watch threads; to the other ranks it is a
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
from megacoder.core.errors import AlikeOnAllRanks, MegacoderError, RankLost
from megacoder.core.files import write_text
from megacoder.core.processes import kill_sibling
from megacoder.parallel.blame import Record, find_loss
from megacoder.parallel.bulletin import Answer, Bulletin, End, Looks
from megacoder.parallel.collectives import flight_record
from megacoder.parallel.journal import CHECKPOINT
from megacoder.parallel.world import World, from_torchrun

__all__ = ["Watch"]

GRACE_SECONDS = 3.0
"""How long a rank may take after the announcement to exit by itself."""
ANSWER_SECONDS = 5.0
"""A store that takes longer than this is taken not to answer."""
OUT_OF_TOUCH_SECONDS = 60.0
"""A rank that waits for nobody exits when the store has not answered for this long, or for the time-out if longer."""
PACKAGE = str(Path(__file__).parent.parent) + os.sep


class Watch:
    """A context manager around the run of one rank; raises RankLost instead of the failure that it explains."""

    def __init__(self, world: World, *, timeout_seconds: float, folder: Path) -> None:
        """`folder` receives the flight record of each rank alive at the end, if torch has one."""
        self._world, self._journal, self._folder = world, world.journal, folder
        self._timeout = timeout_seconds
        self._interval = min(2.0, max(0.2, timeout_seconds / 10))
        self._margin = min(10.0, max(2.0, timeout_seconds / 4))
        self._patience = max(3.0, 3 * self._interval)  # long enough for every living rank to publish
        self._host = socket.gethostname()
        self._num_hosts = from_torchrun("GROUP_WORLD_SIZE", 1)
        if self._num_hosts > 1:  # containers often share a name
            self._host += f", node {from_torchrun('GROUP_RANK', 0)}"
        self._main, self._agent = threading.get_ident(), os.getppid()
        self._active = world.size > 1 and "MASTER_ADDR" in os.environ  # else there are no peers, or no store
        self._bulletin = Bulletin(world.size, world.attempt)
        self._heard = time.monotonic()
        self._end: End | None = None
        self._over, self._failed, self._published = threading.Event(), False, threading.Event()
        self._telling = threading.Lock()  # held from an announcement to its line; this process does not exit meanwhile
        self._is_cut_off = False
        self._threads: list[threading.Thread] = []
        self._beat = 0
        self._moves, self._moved = -1, time.monotonic()

    def __enter__(self) -> Self:
        if self._active:
            self._signals = _Signals()
            for target in (self._keep_beating, self._guard):
                self._threads.append(threading.Thread(target=target, name=target.__name__, daemon=True))
                self._threads[-1].start()
            self._published.wait(ANSWER_SECONDS)  # whoever dies from now on is known
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        try:
            if isinstance(error, MegacoderError) and not isinstance(error, AlikeOnAllRanks):
                self._failed = True
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's must not stop us before the line is out
            if isinstance(error, RankLost):
                raise self._conclude(str(error)) from error
            if isinstance(error, Exception) and not isinstance(error, AlikeOnAllRanks):
                self._announce_own(error)
            elif error is None:
                self._bulletin.ask(lambda: self._publish(finished=True), seconds=ANSWER_SECONDS)
        finally:
            self._over.set()
            for thread in self._threads:  # a thread that returns from the network during shutdown would abort Python
                thread.join(ANSWER_SECONDS)
            self._signals.close()

    def _announce_own(self, error: Exception) -> None:
        """Tells the others to end; raises RankLost where another rank has failed first, as ranks do that read the same
        broken data: one line is enough. A bug keeps its traceback."""
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        line = f"{self._record().name()} failed: {said}"
        if not isinstance(error, MegacoderError):
            self._announce(line, code=1)
            return
        end = self._announce(line, code=error.exit_code)
        if end is not None and (end.line, end.host) != (line, self._host) and end.code != RankLost.exit_code:
            raise self._tell(end) from error

    def _keep_beating(self) -> None:
        """Blocks when the network does; the other thread sees that from `_heard`."""
        while not self._over.is_set():
            with contextlib.suppress(RuntimeError):
                self._bulletin.connect(self._timeout)
                self._publish()
                self._published.set()
                self._end = self._end or self._bulletin.announced()
                self._heard = time.monotonic()
            self._over.wait(self._interval)

    def _guard(self) -> None:
        """Exits the process when the main thread hangs in the network, or keeps running after the end of the run."""
        ended: float | None = None
        has_agent = "TORCHELASTIC_RUN_ID" in os.environ  # else the parent is a shell, which may exit
        while not self._over.wait(self._interval):
            if has_agent and os.getppid() != self._agent:  # killed: nobody is left to stop this rank
                has_agent = False
                say(f"rank {self._world.rank}: torchrun has exited; the rank stops as on a signal")
                os.kill(os.getpid(), signal.SIGTERM)
            self._journal.stop_asked |= self._signals.received()
            now, still = time.monotonic(), self._still_seconds()
            if self._failed:  # the main thread is about to say why
                continue
            if self._end is not None:
                ended = ended or now
                if now - ended > GRACE_SECONDS:
                    self._leave(self._tell(self._end))
            elif self._may_hang() and still > self._timeout + self._margin:
                self._leave(self._conclude(f"{self._journal.operation} did not finish in {still:.0f} s"))
            elif self._journal.stop_asked and still > self._patience and (looks := self._looks_at_silence()):
                self._leave(self._conclude(f"{self._journal.operation} did not finish in {still:.0f} s", looks))
            elif now - self._heard > max(OUT_OF_TOUCH_SECONDS, self._timeout + self._margin):
                self._leave(self._cut_off("out of touch"))

    def _may_hang(self) -> bool:
        """Whether the main thread may be waiting for other ranks: on a GPU, wherever it may be waiting for the GPU."""
        journal = self._journal
        on_gpu = self._world.device.type == "cuda" and journal.step is not None and journal.activity != CHECKPOINT
        return journal.waiting or on_gpu

    def _looks_at_silence(self) -> Looks | None:
        """What all ranks have published, twice, if some rank does not answer. torchrun asks all ranks to stop when one
        has died; those that wait for it in NCCL, or for its checkpoint file, do not notice."""
        looks = self._look_twice()
        if looks is None:
            return None
        before, after = looks
        others = set(range(self._world.size)) - {self._world.rank}
        silent = any(
            rank not in after or (rank in before and before[rank].beat == after[rank].beat and not after[rank].finished)
            for rank in others
        )
        return looks if silent else None

    def _look_twice(self) -> Looks | None:
        return self._bulletin.ask(
            lambda: self._bulletin.two_looks(self._patience), seconds=self._patience + ANSWER_SECONDS
        )

    def _leave(self, error: RankLost) -> None:
        with self._telling:
            if not self._failed:  # else the main thread has failed meanwhile: it leaves, too
                os._exit(error.exit_code)

    def _conclude(self, failure: str, looks: Looks | None = None) -> RankLost:
        """The first announcement after `failure` as an error; made, and printed, by this rank if there is none.

        Ranks that were asked to stop are killed after 30 seconds: what they have seen already is given as `looks`.
        """
        saved = Answer(self._save_flight_record)  # meanwhile, since a disk may take longer than all else
        looks = looks or self._look_twice()
        flight = saved.within(GRACE_SECONDS) or ""
        if looks is None:
            return self._cut_off(failure + flight)
        loss = find_loss(self._record(), failure, *looks, size=self._world.size, now=time.time())
        line = loss.line + flight
        with self._telling:
            end = self._announce(line, [(record.host, record.pid) for record in loss.silent])
            if end is not None and (end.line, end.host) == (line, self._host):
                say(f"megacoder: {line}")
        return self._cut_off(failure + flight) if end is None else self._tell(end)

    def _announce(
        self, line: str, silent: list[tuple[str, int]] | None = None, *, code: int = RankLost.exit_code
    ) -> End | None:
        end = End(line=line, host=self._host, silent=silent or [], code=code)
        return self._bulletin.ask(lambda: self._bulletin.announce(end), seconds=ANSWER_SECONDS)

    def _tell(self, end: End) -> RankLost:
        """The announcement as this rank's error; prints it if no rank of this host has."""
        self._end_silent(end)
        if end.host != self._host:
            with self._telling:
                told = self._bulletin.ask(lambda: self._bulletin.claim(self._host), seconds=ANSWER_SECONDS) is False
                if not told:
                    say(f"megacoder: {end.line}")
        lost = RankLost(end.line, told=True)
        lost.exit_code = end.code
        return lost

    def _cut_off(self, failure: str) -> RankLost:
        """The error of a rank that cannot reach the store; printed by the first thread that comes here."""
        record, address = self._record(), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        error = RankLost(
            f"{record.name()} at {record.place}: {failure}; the store at {address} does not answer either: its host is "
            "down or the network is cut",
            told=True,
        )
        with self._telling:
            if not self._is_cut_off:
                say(f"megacoder: {error}")
            self._is_cut_off = True
        if self._num_hosts > 1:
            self._end_agent()
        return error

    def _end_silent(self, end: End) -> None:
        for host, pid in end.silent:
            if host == self._host:
                kill_sibling(pid)

    def _end_agent(self) -> None:
        """Asks torchrun to exit, and kills it if it does not."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a torchrun that reacts sends it to its ranks
        for number in (signal.SIGTERM, signal.SIGKILL):
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == self._agent:
                with contextlib.suppress(OSError):
                    os.kill(self._agent, number)
                time.sleep(GRACE_SECONDS if number == signal.SIGTERM else 0.0)

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
        """Seconds since the main thread was last seen to move."""
        if self._journal.moves != self._moves:
            self._moves, self._moved = self._journal.moves, time.monotonic()
        return time.monotonic() - self._moved

    def _save_flight_record(self) -> str:
        """Writes it into the run's folder, if there is one; returns the words that say so, or none."""
        record, path = flight_record(), self._folder / "flight" / f"rank-{self._world.rank:05d}.json"
        if record is not None and self._folder.is_dir():
            with contextlib.suppress(OSError):
                write_text(path, record.decode())
                return f"; torch's flight records are in {path.parent}"
        return ""


class _Signals:
    """A socket to which C's signal handler writes at once, also while the main thread is not executing Python."""

    def __init__(self) -> None:
        """Without effect on another thread than the main one, which alone receives signals."""
        self._reading, self._writing = socket.socketpair()
        for end in (self._reading, self._writing):
            end.setblocking(False)
        self._before: int | None = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)

    def received(self) -> bool:
        """Whether a signal that Python handles has arrived since the last call."""
        try:
            return bool(self._reading.recv(64))
        except OSError:  # nothing is there, or `close` was called
            return False

    def close(self) -> None:
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        for end in (self._reading, self._writing):
            end.close()


def _where(thread: int) -> str:
    """The innermost line of this package that a thread is at, such as 'stage.py:44 in forward_backward'."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""
