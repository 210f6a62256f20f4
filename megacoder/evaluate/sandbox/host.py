"""The host's side: starts workers, hands them programs, tries again alone what ran out of time or memory.

A verdict does not depend on how many workers there are: time is CPU time, every worker has its own namespaces, and what
was ended for time or memory while others ran is run once more with nothing beside it; that second verdict counts.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from megacoder.core.errors import MegacoderError
from megacoder.evaluate.sandbox import confine, view
from megacoder.evaluate.sandbox.launcher import receive, send
from megacoder.evaluate.sandbox.program import Outcome, Program, as_message

__all__ = ["Mode", "Sandbox", "SandboxError"]

Mode = Literal["namespaces", "bubblewrap", "unsafe"]
Key = TypeVar("Key", bound=Hashable)

_ROOT = str(Path(__file__).parents[3])
"""What holds the package; bubblewrap shows this folder's part of it as `_SHOWN`."""
_SHOWN = "/run/sandbox"
_START = (
    "import sys, json; sys.path.insert(0, sys.argv[1]); from megacoder.evaluate.sandbox.launcher import main; "
    "del sys.path[0]; main(json.load(sys.stdin))"
)
_START_SECONDS = 60.0
_AGAIN = ("time", "memory")
"""Verdicts that neighbours may have brought about."""


class SandboxError(MegacoderError):
    """Programs cannot be shut in here, or the sandbox itself failed."""


class Sandbox:
    """Workers that run programs; a context manager that leaves no process behind."""

    def __init__(
        self, *, workers: int = 1, mode: Mode | None = None, preload: Sequence[str] = (), tools: Iterable[str] = ()
    ) -> None:
        """`preload` names modules that preloaded Python programs find imported; `tools` executables to be visible.

        Without a `mode` the first that works: bubblewrap then namespaces, the other way round for root, whose files
        only the latter keep closed. SandboxError, which says why, where neither works; "unsafe" is never chosen.
        """
        if workers < 1:
            raise SandboxError(f"{workers} workers: at least one is needed")
        self._preload = list(preload)
        self._paths = view.visible_paths(view.tool_folder(tool) for tool in tools)
        self._launchers: list[subprocess.Popen[bytes]] = []
        self._channels: list[socket.socket] = []
        order: list[Mode] = ["namespaces", "bubblewrap"] if os.geteuid() == 0 else ["bubblewrap", "namespaces"]
        reasons = []
        for self.mode in order if mode is None else [mode]:
            try:
                self._start(workers)
                return
            except SandboxError as error:
                self.close()
                reasons.append(f"{self.mode}: {error}")
        raise SandboxError(
            f"programs cannot be shut in on this machine ({'; '.join(reasons)}); install bubblewrap or allow user "
            "namespaces, or run them with your own rights (--unsafe)"
        )

    def run(self, programs: Iterable[tuple[Key, Program]]) -> Iterator[tuple[Key, Outcome]]:
        """(key, outcome) of every program, as they end; those to be tried again come last."""
        waiting = iter(programs)
        running: dict[socket.socket, tuple[Key, Program]] = {}
        again: list[tuple[Key, Program]] = []
        idle = list(self._channels)
        while True:
            while idle and (following := next(waiting, None)) is not None:
                channel = idle.pop()
                running[channel] = following
                send(channel, as_message(following[1], alone=False))
            if not running:
                break
            ready, _, _ = select.select(list(running), [], [])
            for channel in ready:
                key, program = running.pop(channel)
                outcome, channel = self._outcome(channel)
                idle.append(channel)
                if outcome is None or outcome.verdict in _AGAIN:
                    again.append((key, program))
                else:
                    yield key, outcome
        for key, program in again:
            yield key, self._run_alone(program)

    def run_one(self, program: Program) -> Outcome:
        """The outcome of one program."""
        [(_, outcome)] = self.run([(0, program)])
        return outcome

    def close(self) -> None:
        """Ends the workers and whatever they run."""
        for channel in self._channels:
            channel.close()
        for launcher in self._launchers:
            try:
                launcher.wait(5)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        self._channels, self._launchers = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_alone(self, program: Program) -> Outcome:
        channel = self._channels[0]
        send(channel, as_message(program, alone=True))
        answer = self._answer(channel)
        if "error" in answer:
            raise SandboxError(f"a program could not be run, tried twice: {answer['error']}")
        return Outcome(**answer, alone=True)

    def _outcome(self, channel: socket.socket) -> tuple[Outcome | None, socket.socket]:
        """What a worker answers, None where the sandbox failed; and the worker to go on with."""
        answer = self._answer(channel)
        if "error" not in answer:
            return Outcome(**answer), channel
        if answer.get("lost"):
            self._channels.remove(channel)
            channel.close()
            self._start(1)
            channel = self._channels[-1]
        return None, channel

    def _answer(self, channel: socket.socket) -> dict[str, Any]:
        with suppress(OSError):
            if (answer := receive(channel)) is not None:
                return answer
        return {"error": "the worker ended", "lost": True}

    def _start(self, count: int) -> None:
        """Starts `count` workers and waits until they are ready."""
        groups = [count] if self.mode != "bubblewrap" else [1] * count  # each its own user namespace
        started = []
        for size in groups:
            pairs = [socket.socketpair() for _ in range(size)]
            self._launch([theirs for _, theirs in pairs])
            for ours, theirs in pairs:
                theirs.close()
                started.append(ours)
        self._channels += started
        for channel in started:
            channel.settimeout(_START_SECONDS)
            answer = self._answer(channel)
            if "error" in answer:
                raise SandboxError(self._why(answer))
            channel.settimeout(None)

    def _launch(self, sockets: list[socket.socket]) -> None:
        descriptors = [channel.fileno() for channel in sockets]
        config = {"sockets": descriptors, "preload": self._preload, "mode": self.mode, "paths": self._paths}
        python = [sys.executable, "-I", "-c", _START]
        words = [*python, _ROOT]
        if self.mode == "bubblewrap":
            if shutil.which("bwrap") is None:
                raise SandboxError("bwrap is not installed")
            words = [*_bubblewrap(self._paths), *python, _SHOWN]
        launcher = subprocess.Popen(
            words, pass_fds=descriptors, env=confine.ENVIRONMENT, cwd="/", stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self._launchers.append(launcher)
        assert launcher.stdin is not None
        with suppress(BrokenPipeError), launcher.stdin:  # what it did not read, it ended without: see `_why`
            launcher.stdin.write(json.dumps(config).encode())

    def _why(self, answer: dict[str, Any]) -> str:
        """The reason for a start that failed: what the worker said, or what its process printed last."""
        if not answer.get("lost"):
            return str(answer["error"])
        launcher = self._launchers[-1]
        with suppress(subprocess.TimeoutExpired):
            _, printed = launcher.communicate(timeout=5)
            lines = printed.decode("utf-8", "replace").strip().splitlines()
            if lines:
                return lines[-1]
        return "the worker ended before it was ready"


def _bubblewrap(paths: list[str]) -> list[str]:
    """The command that shuts a worker in as `namespaces` does; it keeps the rights to make namespaces within."""
    words = ["bwrap", "--unshare-all", "--unshare-user", "--cap-add", "ALL", "--uid", "1000", "--gid", "1000"]
    words += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--tmpfs", "/tmp"]
    for path in paths:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--ro-bind", path, path]
    for name in view.DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for link, target in view.LINKS.items():
        words += ["--symlink", target, link]
    for folder in ("/dev/shm", "/etc"):
        words += ["--dir", folder]
    here = str(Path(__file__).parent)
    words += ["--ro-bind", here, f"{_SHOWN}/{Path(here).relative_to(_ROOT)}"]
    return [*words, "--proc", "/proc", "--remount-ro", "/", "--chdir", "/", "--"]
