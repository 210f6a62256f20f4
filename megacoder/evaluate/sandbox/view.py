"""What a program sees of the system, all of it read-only: libraries, interpreters and compilers, nobody's files.

A list of paths is shown in place; everything else (home folders, /var, /run, /sys, /etc except for what tools need) is
not there. /tmp is the program's own and empty.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from megacoder.evaluate.sandbox import kernel

__all__ = ["DEVICES", "FILES", "LINKS", "build_root", "tool_folder", "touch", "visible_paths"]

_SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store"]
_SETTINGS = [
    "alternatives", "dmd.conf", "fonts", "java", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ldc2.conf", "localtime",
    "mono", "perl", "php", "R", "racket", "julia", "lua", "scala",
]  # fmt: skip
"""Names in /etc that tools read; those of Java carry a version (`java-17-openjdk`)."""
DEVICES = ["null", "zero", "full", "random", "urandom"]
LINKS = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
         "/dev/stderr": "/proc/self/fd/2"}  # fmt: skip
FILES = {
    "/etc/passwd": "user:x:1000:1000::/tmp/home:/bin/sh\n",
    "/etc/group": "user:x:1000:\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
}
"""Shown instead of the machine's own."""
_FOLDERS = ["/proc", "/tmp", "/dev/shm"]


def visible_paths(more: Iterable[str] = ()) -> list[str]:
    """Absolute paths to show: the system's, this interpreter's and `more`, those that exist, none inside another."""
    settings = [f"/etc/{name}" for name in _SETTINGS]
    settings += [str(path) for path in Path("/etc").glob("java-*")] if os.path.isdir("/etc") else []
    wanted = [*_SYSTEM, *settings, sys.prefix, sys.base_prefix, *map(os.path.realpath, more)]
    shown: list[str] = []
    for path in wanted:
        inside = any(path == known or path.startswith(known + "/") for known in shown)
        if os.path.exists(path) and not inside:
            shown.append(path)
    return shown


def tool_folder(tool: str) -> str:
    """What to show for an executable: the folder it was installed in, never a home folder or the root; a jar alone."""
    if tool.endswith(".jar"):
        return tool
    folder = Path(os.path.realpath(tool)).parent
    prefix = folder.parent
    return str(prefix if folder.name == "bin" and len(prefix.parts) > 2 and prefix != Path.home() else folder)


def build_root(paths: Iterable[str]) -> None:
    """Makes a new root that shows `paths`, within the process's own namespaces, and detaches the old one."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    common = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", "/tmp", "tmpfs", common, "mode=0755,size=1m")
    os.mkdir("/tmp/.old")
    kernel.pivot_root("/tmp", "/tmp/.old")
    os.chdir("/")
    for path in paths:
        _show(path)
    for folder in _FOLDERS:
        os.makedirs(folder, exist_ok=True)
    for name in DEVICES:
        touch(f"/dev/{name}")
        kernel.mount(f"/.old/dev/{name}", f"/dev/{name}", flags=kernel.MS_BIND)
    for link, target in LINKS.items():
        os.symlink(target, link)
    for name, text in FILES.items():
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w") as file:
            file.write(text)
    kernel.mount("proc", "/proc", "proc", common | kernel.MS_NOEXEC | kernel.MS_RDONLY)
    kernel.unmount("/.old")
    os.rmdir("/.old")
    kernel.mount("none", "/", flags=kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | common)


def _show(path: str) -> None:
    old = "/.old" + path
    if os.path.islink(old):  # /bin on systems where it is /usr/bin
        os.symlink(os.readlink(old), path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        touch(path)
    kernel.mount(old, path, flags=kernel.MS_BIND | kernel.MS_REC)
    kernel.make_read_only(path)


def touch(path: str) -> None:
    """Makes an empty file, and the folders above it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
