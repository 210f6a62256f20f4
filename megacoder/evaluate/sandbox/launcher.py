"""Workers: processes in namespaces, with Python modules imported, that run one program after another.

Started as `python -I` with a socket as stdin, over which it gets what to import, later how to confine itself, and a
socket for each worker to serve. Messages are JSON after their length in four bytes. A worker exits when its socket is
closed, and with it, since it is the first process of its namespace, all that it started.
"""

import gc
import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any, NoReturn

from megacoder.evaluate.sandbox import confine, kernel, overseer, view
from megacoder.evaluate.sandbox.own_files import OwnFiles

__all__ = ["main", "packed", "receive", "send"]

_INSIDE = 1000
"""User and group that programs run as, as seen inside."""
_NOBODY = 65534
"""The same user seen from outside, where root starts the sandbox: root's files stay closed to programs."""


def packed(message: Any) -> bytes:
    """The bytes of a message."""
    text = json.dumps(message).encode()
    return struct.pack("<I", len(text)) + text


def send(channel: socket.socket, message: Any) -> None:
    """Sends one message."""
    channel.sendall(packed(message))


def receive(channel: socket.socket) -> Any:
    """Receives the next message, None at the end."""
    header = channel.recv(4, socket.MSG_WAITALL)
    if len(header) < 4:
        return None
    size = struct.unpack("<I", header)[0]
    text = channel.recv(size, socket.MSG_WAITALL)
    return json.loads(text) if len(text) == size else None


def main() -> NoReturn:
    """Loads, then serves each socket in a process of its own, and waits for these processes."""
    gc.disable()  # nearly everything that loading allocates stays
    control = socket.socket(fileno=0)
    for name in receive(control) or ():
        with suppress(ImportError):
            __import__(name)
    config = receive(control)
    if config is None:  # nobody wants workers any more
        os._exit(0)
    sockets = [socket.recv_fds(control, 1, 1)[1][0] for _ in range(config["workers"])]
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, control.detach())
    os.close(null)
    children = []
    for descriptor in sockets:
        asking, asked = os.pipe()
        telling, told = os.pipe()
        child = os.fork()
        if child == 0:
            for other in (asking, told, *(other for other in sockets if other != descriptor)):
                os.close(other)
            channel = socket.socket(fileno=descriptor)
            try:
                _Worker(channel, config).start(asked, telling)
            except BaseException as error:
                with suppress(OSError):
                    send(channel, {"error": f"{type(error).__name__}: {error}"})
            os._exit(1)
        for mine in (asked, telling):
            os.close(mine)
        if os.read(asking, 1):  # it has its user namespace, whose users only this process may map
            os.write(told, b"y" if _name_users(child) else b"n")
        for ours in (asking, told):
            os.close(ours)
        children.append(child)
    for descriptor in sockets:
        os.close(descriptor)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)


def _name_users(child: int) -> bool:
    """As root: maps `child`'s root to root, to set things up, and its user 1000 to nobody."""
    if os.geteuid() != 0:
        return False
    try:
        for kind in ("uid", "gid"):
            with open(f"/proc/{child}/{kind}_map", "w") as file:
                file.write(f"0 0 1\n{_INSIDE} {_NOBODY} 1\n")
        return True
    except OSError:
        return False


class _Worker:
    """Serves one socket."""

    def __init__(self, channel: socket.socket, config: dict[str, Any]) -> None:
        self.channel, self.config = channel, config
        self.mode: str = config["mode"]
        self.identity: confine.Identity | None = None

    def start(self, asked: int, telling: int) -> NoReturn:
        """Confines itself, says that it is ready, and serves until the socket is closed."""
        if self.mode == "namespaces":
            self._enter_namespaces(asked, telling)
        for descriptor in (asked, telling):
            os.close(descriptor)
        if self.mode == "unsafe":
            if sys.platform == "linux":
                kernel.set_subreaper()
        else:
            # From inside, the first process of a namespace gets only signals that it handles, as Python does this one;
            # and without root, programs run as the same user, who may signal it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            kernel.set_dumpable(False)
            kernel.bound_capabilities()
            kernel.forbid_new_privileges()
            with suppress(OSError):
                kernel.new_session_keyring()
            self.files = OwnFiles(self.identity, self.config["paths"])
            kernel.prepare()
        gc.freeze()  # what is here now is never collected, nor copied because a program collects
        gc.enable()
        send(self.channel, {"ready": True})
        while (program := receive(self.channel)) is not None:
            send(self.channel, self._serve(program))
        os._exit(0)

    def _enter_namespaces(self, asked: int, telling: int) -> None:
        user, group = os.geteuid(), os.getegid()
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # the first to be killed where memory runs out
        kernel.unshare(kernel.NEW_USER)
        os.write(asked, b"?")
        if os.read(telling, 1) == b"y":
            self.identity = (_INSIDE, _INSIDE)
        else:
            for name, text in (
                ("setgroups", "deny"), ("uid_map", f"{_INSIDE} {user} 1"), ("gid_map", f"{_INSIDE} {group} 1"),
            ):  # fmt: skip
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        kernel.unshare(
            kernel.NEW_MOUNTS | kernel.NEW_PIDS | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS | kernel.NEW_CGROUP
        )
        child = os.fork()
        if child:
            self.channel.close()
            os.waitpid(child, 0)
            os._exit(0)
        kernel.set_death_signal(signal.SIGKILL)
        socket.sethostname("sandbox")
        view.build_root(self.config["paths"])

    def _serve(self, program: dict[str, Any]) -> dict[str, Any]:
        """Runs one program; {"error": why} where the sandbox itself failed."""
        if self.mode == "unsafe":
            import tempfile  # not needed elsewhere, and what a worker holds makes every fork slower

            with tempfile.TemporaryDirectory(prefix="megacoder-", ignore_cleanup_errors=True) as work:
                return overseer.oversee(program, self.channel, confined=False, identity=None, work=work)
        try:
            if not kernel.can_deny_system_calls():  # else programs can make no IPC object that outlives them
                kernel.unshare(kernel.NEW_IPC)
            self.files.provide(program["steps"][-1]["limits"])
            return overseer.oversee(program, self.channel, confined=True, identity=self.identity, work=confine.WORK)
        except OSError as error:
            return {"error": str(error)}
        finally:
            self.files.clear(program["files"])
