"""A program's own files: /tmp and /dev/shm, in memory, limited, empty when it starts.

They disappear with their mounts. Unmounting makes the worker wait until every processor has noticed, which can take as
long as a small program runs; so where a program leaves nothing but what it was given, that is removed and the next
program gets the same mounts. The file systems themselves tell whether anything else is left: a file takes an inode.
"""

import os
from collections.abc import Iterable
from typing import Any

from megacoder.evaluate.sandbox import confine, kernel, view

__all__ = ["MOUNTED", "OwnFiles", "used_bytes"]

MOUNTED = ("/tmp", "/dev/shm")
_MIB = 1 << 20


class OwnFiles:
    """The mounts of one worker, which is alone in its namespaces and runs one program at a time."""

    def __init__(self, identity: confine.Identity | None, paths: Iterable[str]) -> None:
        """Those of `paths`, which programs are to see, that lie under a mount are shown in it."""
        self._identity = identity
        self._covered = [path for path in paths if path.startswith(tuple(f"{mounted}/" for mounted in MOUNTED))]
        self._disk_mb: int | None = None
        """size of the mounts that are there, which are empty between programs; None without any"""
        self._empty: list[tuple[Any, ...]] = []

    def provide(self, limits: dict[str, Any]) -> None:
        """Mounts empty file systems of the size that `limits` allow."""
        if self._disk_mb != limits["disk_mb"]:
            self._remove()
            self._mount(limits["disk_mb"])

    def clear(self, names: Iterable[str]) -> None:
        """Removes what the program was given, files `names`, and all it left; call when its processes have ended."""
        try:
            folder = os.open(confine.WORK, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                for name in names:
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
            for path in (confine.WORK, confine.HOME):
                os.rmdir(path)
            left = [_state(mounted) for mounted in MOUNTED] != self._empty
        except OSError:
            left = True
        if left:
            self._remove()

    def _mount(self, disk_mb: int) -> None:
        shown = [(path, os.path.isdir(path), os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in self._covered]
        user, group = self._identity or (os.getuid(), os.getgid())
        size, inodes = disk_mb * _MIB, 256 * disk_mb
        common = kernel.MS_NOSUID | kernel.MS_NODEV
        owner = f"mode=0700,uid={user},gid={group}"
        kernel.mount("tmpfs", "/tmp", "tmpfs", common, f"{owner},size={size},nr_inodes={inodes}")
        self._disk_mb = disk_mb
        kernel.mount("tmpfs", "/dev/shm", "tmpfs", common, f"{owner},size={size // 4},nr_inodes=1024")
        for path, is_folder, descriptor in shown:  # such as the interpreter's environment
            if is_folder:
                os.makedirs(path)
            else:
                view.touch(path)
            kernel.mount(f"/proc/self/fd/{descriptor}", path, flags=kernel.MS_BIND | kernel.MS_REC)
            kernel.make_read_only(path)
            os.close(descriptor)
        self._empty = [_state(mounted) for mounted in MOUNTED]

    def _remove(self) -> None:
        if self._disk_mb is not None:
            self._disk_mb = None
            for mounted in MOUNTED:
                kernel.unmount(mounted)


def used_bytes(mounted: str) -> int:
    found = os.statvfs(mounted)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _state(mounted: str) -> tuple[Any, ...]:
    """Tells a file system in use from an empty one; also holds what a program may change of its root."""
    root, space = os.stat(mounted), os.statvfs(mounted)
    return root.st_mode, root.st_uid, root.st_gid, os.listxattr(mounted), space.f_bfree, space.f_ffree
