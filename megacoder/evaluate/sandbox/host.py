"""The host's side: starts workers, hands them programs, retries alone what ran out of time or memory.

A verdict does not depend on how many workers there are: time is CPU time, every worker has its own namespaces, and a
program that was killed for time or memory while others ran is run again alone; that second verdict counts.
"""

import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from megacoder.core.errors import MegacoderError
from megacoder.evaluate.sandbox import confine, view
from megacoder.evaluate.sandbox.launcher import packed, receive, send
from megacoder.evaluate.sandbox.program import Outcome, Program, as_message

__all__ = ["Launcher", "Mode", "Sandbox", "SandboxError"]

Mode = Literal["namespaces", "bubblewrap", "unsafe"]
Key = TypeVar("Key", bound=Hashable)

_ROOT = str(Path(__file__).parents[3])
"""The folder that holds the package; bubblewrap shows this sub-package of it under `_SHOWN`."""
_SHOWN = "/run/sandbox"
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from megacoder.evaluate.sandbox.launcher import main; "
    "del sys.path[0]; main()"
)
_START_SECONDS, _END_SECONDS = 60.0, 5.0
_AGAIN = ("time", "memory")
"""Verdicts that other running programs may have caused."""


class SandboxError(MegacoderError):
    """Programs cannot be confined here, or the sandbox itself failed."""


class Launcher:
    """A process that loads modules, then becomes workers, until it is closed.

    Loading takes as long as many programs. Where the modules are known early, a process started `ahead` loads them
    while other work is done.
    """

    def __init__(self, words: list[str], preload: Sequence[str]) -> None:
        """`words` is its command."""
        self.words, self.preload = words, list(preload)
        self._serves = False
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                words, env=confine.ENVIRONMENT, cwd="/", stdin=theirs.fileno(), stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        self._send(self.preload)

    @classmethod
    def ahead(cls, preload: Sequence[str]) -> "Launcher":
        """A launcher for a later sandbox with this `preload`, no tools and no mode; other sandboxes do not use it."""
        mode = next(mode for mode in _order() if mode != "bubblewrap" or shutil.which("bwrap"))
        return cls(_command(mode, view.visible_paths()), preload)

    def serve(self, sockets: list[socket.socket], config: dict[str, Any]) -> None:
        """Becomes a worker for each of `sockets`, which are closed here."""
        self._serves = True
        self._send({"workers": len(sockets), **config})
        for channel in sockets:
            with suppress(OSError), channel:  # as in `_send`
                socket.send_fds(self._control, [b"."], [channel.fileno()])

    def last_words(self) -> str:
        """The last line that the process printed before it ended; empty without one."""
        with suppress(subprocess.TimeoutExpired):
            _, printed = self.process.communicate(timeout=_END_SECONDS)
            return (printed.decode("utf-8", "replace").strip().splitlines() or [""])[-1]
        return ""

    def close(self) -> None:
        """Waits until the process and its workers have ended, as they do once their sockets are closed."""
        self._control.close()
        if not self._serves:
            self.process.kill()
        try:
            self.process.communicate(timeout=_END_SECONDS)  # to the end of stderr, which every worker holds
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # the process may have ended: `Sandbox._why` then reports why
            send(self._control, message)


class Sandbox:
    """Workers that run programs; a context manager that leaves no process behind."""

    def __init__(
        self, *, workers: int = 1, mode: Mode | None = None, preload: Sequence[str] = (), tools: Iterable[str] = (),
        ahead: Launcher | None = None,
    ) -> None:  # fmt: skip
        """`preload` names modules that preloaded Python programs find imported, `tools` executables to be visible.

        Without a `mode`, the first that works is used: bubblewrap, then namespaces, or the other way round for root,
        whose files only namespaces keep closed. SandboxError, which says why, where neither works; "unsafe" is never
        chosen. `ahead` is used if it is the process that is needed.
        """
        if workers < 1:
            raise SandboxError(f"{workers} workers: at least one is needed")
        self._preload = list(preload)
        self._paths = view.visible_paths(view.tool_folder(tool) for tool in tools)
        self._ahead = ahead
        self._launchers: list[Launcher] = []
        self._channels: list[socket.socket] = []
        reasons = []
        for self.mode in _order() if mode is None else [mode]:
            try:
                self._start(workers)
                return
            except SandboxError as error:
                self.close()
                reasons.append(f"{self.mode}: {error}")
            except BaseException:
                self.close()
                raise
        raise SandboxError(
            f"programs cannot be confined on this machine ({'; '.join(reasons)}); install bubblewrap or allow user "
            "namespaces, or run them with your own rights (--unsafe)"
        )

    def run(self, programs: Iterable[tuple[Key, Program]]) -> Iterator[tuple[Key, Outcome]]:
        """(key, outcome) of every program, as they end; those that are retried come last."""
        waiting = ((key, program, packed(as_message(program, alone=False))) for key, program in programs)
        running: dict[socket.socket, tuple[Key, Program]] = {}
        again: list[tuple[Key, Program]] = []
        ended: list[tuple[Key, Outcome]] = []
        idle, following = list(self._channels), next(waiting, None)
        while True:
            while idle and following is not None:
                channel = idle.pop()
                key, program, message = following
                running[channel] = key, program
                with suppress(OSError):  # if the worker has ended, waiting for its answer will show it
                    channel.sendall(message)
                following = next(waiting, None)  # prepared now, so that no worker waits for it later
            yield from ended  # after the workers have work, so that none waits for the caller
            if not running:
                break
            ended = []
            ready, _, _ = select.select(list(running), [], [])
            for channel in ready:
                key, program = running.pop(channel)
                outcome, channel = self._outcome(channel)
                idle.append(channel)
                if outcome is None or outcome.verdict in _AGAIN:
                    again.append((key, program))
                else:
                    ended.append((key, outcome))
        for key, program in again:
            yield key, self._run_alone(program)

    def close(self) -> None:
        """Stops the workers and whatever they run."""
        for channel in self._channels:
            channel.close()
        for launcher in self._launchers:
            launcher.close()
        self._channels, self._launchers = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run_alone(self, program: Program) -> Outcome:
        channel = self._channels[0]
        send(channel, as_message(program, alone=True))
        answer = self._answer(channel)
        if "error" in answer:
            raise SandboxError(f"a program could not be run, tried twice: {answer['error']}")
        return Outcome(**answer, alone=True)

    def _outcome(self, channel: socket.socket) -> tuple[Outcome | None, socket.socket]:
        """What a worker answers, None where the sandbox failed; and the worker to continue with."""
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
        groups = [count] if self.mode != "bubblewrap" else [1] * count  # bubblewrap: a user namespace each
        started = []
        for size in groups:
            pairs = [socket.socketpair() for _ in range(size)]
            self._launch([theirs for _, theirs in pairs])
            started += [ours for ours, _ in pairs]
        self._channels += started
        for channel in started:
            channel.settimeout(_START_SECONDS)
            answer = self._answer(channel)
            if "error" in answer:
                raise SandboxError(self._why(answer))
            channel.settimeout(None)

    def _launch(self, sockets: list[socket.socket]) -> None:
        if self.mode == "bubblewrap" and shutil.which("bwrap") is None:
            raise SandboxError("bwrap is not installed")
        words, launcher, self._ahead = _command(self.mode, self._paths), self._ahead, None
        if launcher is None or (launcher.words, launcher.preload) != (words, self._preload):
            launcher = Launcher(words, self._preload)
        self._launchers.append(launcher)
        launcher.serve(sockets, {"mode": self.mode, "paths": self._paths})

    def _why(self, answer: dict[str, Any]) -> str:
        """The reason for a start that failed: what the worker said, or what its process printed last."""
        if not answer.get("lost"):
            return str(answer["error"])
        return self._launchers[-1].last_words() or "the worker ended before it was ready"


def _order() -> list[Mode]:
    """The order in which modes are tried."""
    return ["namespaces", "bubblewrap"] if os.geteuid() == 0 else ["bubblewrap", "namespaces"]


def _command(mode: Mode, paths: list[str]) -> list[str]:
    """The command that starts a launcher; in bubblewrap mode, inside bubblewrap with `paths` shown."""
    python = [sys.executable, "-I", "-c", _START]
    return [*_bubblewrap(paths), *python, _SHOWN] if mode == "bubblewrap" else [*python, _ROOT]


def _bubblewrap(paths: list[str]) -> list[str]:
    """The command that confines a worker as `namespaces` does; it keeps the rights to make namespaces inside."""
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
