"""Several hosts on one machine: network namespaces with their own addresses, names and links."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


class Hosts:
    """`size` namespaces on one bridge, which has a namespace of its own; host i is 10.98.7.i, its name host-i."""

    def __init__(self, size, folder):
        self.names = [f"megacoder-{uuid.uuid4().hex[:6]}-{index}" for index in range(size + 1)]
        self.folder = folder
        lines = ["127.0.0.1 localhost", *(f"10.98.7.{host} host-{host}" for host in range(1, size + 1))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "resolv.conf").write_text("")  # nobody to ask, so that nobody waits for an answer

    def __enter__(self):
        switch = self.names[0]
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self.names[1:], 1):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "eth", "netns", name, "type", "veth", "peer", "name", f"port{host}", "netns", switch)
            ip("-n", name, "addr", "add", f"10.98.7.{host}/24", "dev", "eth")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", switch, "link", "set", f"port{host}", "master", "bridge", "up")
        return self

    def __exit__(self, *exception):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self, host):
        ip("-n", self.names[host], "link", "set", "eth", "down")

    def start(self, host, *command, **environment):
        """A process on host `host` (from 1), in a session of its own."""
        identity = (
            f"hostname host-{host}; mount --bind {self.folder}/hosts /etc/hosts;"
            f'mount --bind {self.folder}/resolv.conf /etc/resolv.conf; exec "$@"'
        )
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c", identity, "sh", *command],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def pids(self, host):
        """Of every process on the host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], check=True, capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def need_namespaces():
    """Skips the test where this process may not make hosts."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs `ip` of iproute2 and `unshare` of util-linux")
    probe = f"megacoder-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True).returncode:
        pytest.skip("may not make network namespaces: needs root and CAP_SYS_ADMIN")
    subprocess.run(["ip", "netns", "del", probe], check=True)


def free_port() -> int:
    """One that nobody has, and that the system gives to nobody who asks for any, as tests beside this one do."""
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise OSError("no port is free")
