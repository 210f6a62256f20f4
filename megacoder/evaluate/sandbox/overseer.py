"""What a worker does with one program: starts each step, counts what it uses, says how it ended, kills the rest.

A worker is the first process of its namespaces: it inherits orphans, and kills them until there is none (for their
files see `own_files`). A program cannot harm it: the first process gets no signal from inside that it does not handle,
its memory is closed to others, and the program holds none of its files but the two that it writes to.

Counted every 20 ms: CPU time (of live processes and, through the kernel, of those that were waited for), resident
memory (shared pages once, where a first sum exceeds the limit) with the files in memory, processes and threads, files.
Where the whole machine runs out of memory the program is killed too, whoever took it: "memory", retried alone.
"""

import os
import re
import resource
import select
import signal
import socket
import time
from contextlib import suppress
from typing import Any

from megacoder.evaluate.sandbox import confine
from megacoder.evaluate.sandbox.own_files import MOUNTED, used_bytes

__all__ = ["oversee"]

_TICK = 0.02
_KEPT_BYTES = 16384
_MIB = 1 << 20
_PAGE = os.sysconf("SC_PAGESIZE")
_CLOCK = os.sysconf("SC_CLK_TCK")
_SCARCE = 0.03
"""Share of the machine's memory that must stay available."""


def oversee(
    program: dict[str, Any], channel: socket.socket, *, confined: bool, identity: confine.Identity | None, work: str
) -> dict[str, Any]:
    """Runs the steps until one does not pass; returns how the last one that ran ended, in `Outcome`'s fields.

    Where `channel` is closed, nobody waits for the answer any more: this process exits.
    """
    home = confine.HOME if confined else work
    environment = confine.ENVIRONMENT | {"HOME": home, "TMPDIR": work} | program["environment"]
    made = [work, home] if confined else []
    for folder in made:
        os.mkdir(folder)
    for name, text in program["files"].items():
        path = work
        *folders, last = name.split("/")
        for folder in folders:
            path = f"{path}/{folder}"
            if not os.path.isdir(path):
                os.mkdir(path)
                made.append(path)
        made.append(f"{path}/{last}")
        with open(made[-1], "xb") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
    if identity is not None:
        for path in made:
            os.chown(path, *identity)
    confine.take_environment(environment)
    outcome: dict[str, Any] = {}
    for index, step in enumerate(program["steps"]):
        run = _Run(step, channel, confined=confined)
        outcome = run.run(identity, work) | {"step": index}
        if outcome["verdict"] != "passed":
            break
    return outcome


class _Seen:
    """What a step has used so far. (Not a dataclass: that would bring more modules into every fork.)"""

    def __init__(self) -> None:
        self.cpu = self.peak = 0.0
        """seconds, bytes"""
        self.output = 0
        self.kept: dict[int, bytearray] = {}
        """the beginning of what came through each pipe"""


class _Run:
    """One step."""

    def __init__(self, step: dict[str, Any], channel: socket.socket, *, confined: bool) -> None:
        self.step, self.limits, self.channel, self.confined = step, step["limits"], channel, confined
        self.preloaded = step["argv"][0] == "<python>"
        self.secret = os.urandom(16)
        self.seen = _Seen()
        self.ended: int | None = None
        """wait status of the program's first process"""
        self.pid = 0

    def run(self, identity: confine.Identity | None, work: str) -> dict[str, Any]:
        reading, writing = zip(*(os.pipe() for _ in range(3)), strict=True)  # stdout, stderr, mark
        start, cpu_before = time.monotonic(), _children_cpu()
        self._start(writing, identity, work)
        self.seen.kept = {descriptor: bytearray() for descriptor in reading}
        for descriptor in reading:
            os.set_blocking(descriptor, False)
        try:
            broken = self._watch(reading[:2], start, cpu_before)
        finally:
            self._end_all()
            for descriptor in writing:  # held until here, so that a program closing its pipes wakes nobody
                os.close(descriptor)
        self._read(reading)
        out, err, mark = (bytes(self.seen.kept[descriptor]) for descriptor in reading)
        for descriptor in reading:
            os.close(descriptor)
        wall, cpu = time.monotonic() - start, max(self.seen.cpu, _children_cpu() - cpu_before)
        code = os.waitstatus_to_exitcode(self.ended) if self.ended is not None else -signal.SIGKILL
        return {
            "verdict": broken or self._found_out(self.ended, cpu, mark, err) or self._judge(code, out, err, mark),
            "exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None,
            "stdout": out[:_KEPT_BYTES].decode("utf-8", "replace"),
            "stderr": err[:_KEPT_BYTES].decode("utf-8", "replace"),
            "cpu_seconds": cpu, "wall_seconds": wall, "peak_mb": self.seen.peak / _MIB,
        }  # fmt: skip

    def _start(self, writing: tuple[int, ...], identity: confine.Identity | None, work: str) -> None:
        """Forks the program, whose output and mark go to `writing`."""
        limits = confine.kernel_limits(self.limits, confined=self.confined)
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            null = os.open(os.devnull, os.O_RDONLY)
            for target, source in enumerate((null, *writing[:2])):
                os.dup2(source, target)
            confine.become_program(
                self.step["argv"], limits, writing[2], self.secret, confined=self.confined, identity=identity, work=work
            )  # fmt: skip

    def _judge(self, code: int, out: bytes, err: bytes, mark: bytes) -> str:
        """The verdict on a program that kept within its limits."""
        if code:
            return "crashed" if code < 0 else "failed"
        if self.preloaded and mark != self.secret:
            return "ended early"
        complaint = self.step["complaint"]
        complains = complaint and re.search(complaint.encode(), err, re.MULTILINE)
        return "failed" if complains or (self.step["silent"] and (out or err)) else "passed"

    def _watch(self, reading: tuple[int, ...], start: float, cpu_before: float) -> str | None:
        """Watches until the program ends (None) or exceeds a limit (its name)."""
        poller = select.poll()
        for descriptor in reading:
            poller.register(descriptor, select.POLLIN)
        poller.register(self.channel, getattr(select, "POLLRDHUP", select.POLLHUP))
        ending = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else None
        if ending is not None:
            poller.register(ending, select.POLLIN)
        next_tick = start + _TICK
        try:
            while True:
                timeout = max(0.0, next_tick - time.monotonic()) * 1000
                for descriptor, _ in poller.poll(timeout):
                    if descriptor == self.channel.fileno():
                        self._end_all()
                        os._exit(0)
                    if descriptor in reading:
                        self._read((descriptor,))
                self._reap()
                if self.seen.output > self.limits["output_kb"] * 1024:
                    return "output"
                if self.ended is not None:
                    return self._too_much(cpu_before)
                if time.monotonic() >= next_tick:
                    broken = "time" if time.monotonic() - start > self.step["wall"] else self._too_much(cpu_before)
                    if broken:
                        return broken
                    next_tick = time.monotonic() + _TICK
        finally:
            if ending is not None:
                os.close(ending)

    def _too_much(self, cpu_before: float) -> str | None:
        """Which limit is exceeded at this moment."""
        if not self.confined:
            self.seen.cpu = _children_cpu() - cpu_before
            return None
        processes = [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        cpu, memory, threads = _children_cpu() - cpu_before, 0, 0
        for process in processes:
            used = _usage(process)
            cpu, memory, threads = cpu + used[0], memory + used[1], threads + used[2]
        files = sum(used_bytes(mounted) for mounted in MOUNTED)
        limit = self.limits["memory_mb"] * _MIB
        if memory + files > limit:
            memory = sum(map(_proportional_bytes, processes))
        self.seen.cpu, self.seen.peak = max(self.seen.cpu, cpu), max(self.seen.peak, memory + files)
        if memory + files > limit or (memory > limit / 8 and _machine_is_full()):
            return "memory"
        if threads > self.limits["processes"]:
            return "processes"
        return "time" if cpu > self.limits["seconds"] else None

    def _found_out(self, status: int | None, cpu: float, mark: bytes, err: bytes) -> str | None:
        """The kernel limit that the program met, if it did not exit with 0."""
        if status == 0:
            return None
        ended_by = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
        if ended_by == signal.SIGXCPU or cpu > self.limits["seconds"]:
            return "time"
        if ended_by == signal.SIGXFSZ or (self.confined and any(map(_is_full, MOUNTED))):
            return "disk"
        if ended_by == signal.SIGABRT and b"std::bad_alloc" in err:
            return "memory"
        return next((word for word in ("memory", "disk", "processes") if mark.startswith(word.encode())), None)

    def _read(self, descriptors: tuple[int, ...]) -> None:
        """Reads what is in the pipes, until it is more than is allowed."""
        for descriptor in descriptors:
            while True:
                try:
                    piece = os.read(descriptor, 65536)
                except BlockingIOError:
                    break
                if not piece:
                    break
                self.seen.output += len(piece)
                kept = self.seen.kept[descriptor]
                kept += piece[: _KEPT_BYTES - len(kept)]
                if self.seen.output > self.limits["output_kb"] * 1024:
                    return

    def _reap(self) -> None:
        """Waits for what has ended, orphans too, which the first process inherits."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.ended = status

    def _end_all(self) -> None:
        """Kills every process of the program until there is none."""
        while True:
            if self.confined:
                _kill(-1)
            else:
                _kill(-self.pid)
                for child in _descendants(os.getpid()):
                    _kill(child)
            try:
                pid, status = os.waitpid(-1, 0 if self.confined else os.WNOHANG)
            except ChildProcessError:
                return
            if pid == self.pid and self.ended is None:
                self.ended = status
            if pid == 0:
                time.sleep(0.005)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)  # a negative one is a group, -1 all but us


def _descendants(parent: int) -> list[int]:
    """Children of `parent`, which as their subreaper inherits its grandchildren as well."""
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _usage(process: int) -> tuple[float, int, int]:
    """(CPU seconds with waited-for children, resident bytes that are no file's, threads); zeros if it is gone."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{process}/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0.0, 0, 0
    shared_memory = shared if b"Z" not in fields[0] and _maps_shared_memory(process) else 0
    return sum(map(int, fields[11:15])) / _CLOCK, (resident - shared + shared_memory) * _PAGE, int(fields[17])


def _maps_shared_memory(process: int) -> bool:
    """Whether much of the shared memory is anonymous: it belongs to no file, so nothing else counts it."""
    try:
        with open(f"/proc/{process}/status", "rb") as file:
            lines = [line for line in file if line.startswith(b"RssShmem")]
        return bool(lines) and int(lines[0].split()[1]) > 4096
    except (OSError, ValueError):
        return False


def _proportional_bytes(process: int) -> int:
    """Resident bytes, a page that n processes share counted as 1/n."""
    try:
        with open(f"/proc/{process}/smaps_rollup", "rb") as file:
            lines = {line.split(b":")[0]: line.split() for line in file}
        return sum(int(lines[name][1]) for name in (b"Pss_Anon", b"Pss_Shmem") if name in lines) * 1024
    except (OSError, ValueError, IndexError):
        return 0


def _is_full(mounted: str) -> bool:
    found = os.statvfs(mounted)
    return found.f_bfree == 0 or found.f_ffree == 0


def _machine_is_full() -> bool:
    with open("/proc/meminfo", "rb") as file:
        lines = {line.split(b":")[0]: int(line.split()[1]) for line in file}
    return lines.get(b"MemAvailable", 1) < _SCARCE * lines[b"MemTotal"]
