"""Linux system calls that Python 3.11 does not offer, through the C library; each raises OSError where it fails."""

import ctypes
import os
from collections.abc import Callable
from functools import cache, partial

__all__ = [
    "MS_BIND", "MS_NODEV", "MS_NOEXEC", "MS_NOSUID", "MS_PRIVATE", "MS_RDONLY", "MS_REC", "MS_REMOUNT", "NEW_CGROUP",
    "NEW_IPC", "NEW_MOUNTS", "NEW_NET", "NEW_PIDS", "NEW_USER", "NEW_UTS", "become", "bound_capabilities",
    "can_deny_system_calls", "deny_system_calls", "forbid_new_privileges",
    "make_read_only", "mount", "new_session_keyring", "pivot_root", "prepare", "set_death_signal", "set_dumpable",
    "set_subreaper", "unmount", "unshare",
]  # fmt: skip

NEW_MOUNTS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER = 22, 36
_LAST_CAPABILITY = 40  # CAP_CHECKPOINT_RESTORE; the call fails for those that a kernel does not have
_EPERM, _ENOSYS = 1, 38
_MNT_DETACH = 2
_KEYCTL_JOIN_SESSION_KEYRING = 1

_NUMBERS: dict[str, dict[str, int]] = {
    # Apart from `pivot_root`, `keyctl`, `clone` and `clone3`, calls that programs here never need: memory that no file
    # system or process accounts for, other processes' memory, keys, namespaces, mounts, and interfaces to the kernel.
    "x86_64": {
        "audit": 0xC000003E, "clone": 56, "clone3": 435, "pivot_root": 155, "keyctl": 250, "capset": 126,
        "memfd_create": 319,
        "memfd_secret": 447, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "ptrace": 101,
        "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438, "add_key": 248,
        "request_key": 249, "unshare": 272, "setns": 308, "chroot": 161, "mount": 165, "umount2": 166, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "open_by_handle_at": 304,
        "fanotify_init": 300, "kexec_load": 246, "init_module": 175, "finit_module": 313, "swapon": 167,
        "quotactl": 179, "acct": 163, "syslog": 103,
    },
    "aarch64": {
        "audit": 0xC00000B7, "clone": 220, "clone3": 435, "pivot_root": 41, "keyctl": 219, "capset": 91,
        "memfd_create": 279,
        "memfd_secret": 447, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "ptrace": 117,
        "process_vm_readv": 270,
        "process_vm_writev": 271, "kcmp": 272, "pidfd_getfd": 438, "add_key": 217,
        "request_key": 218, "unshare": 97, "setns": 268, "chroot": 51, "mount": 40, "umount2": 39, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
        "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "open_by_handle_at": 265,
        "fanotify_init": 262, "kexec_load": 104, "init_module": 105, "finit_module": 273, "swapon": 224,
        "quotactl": 60, "acct": 89, "syslog": 116,
    },
}  # fmt: skip


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, *values: int) -> None:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _checked(_libc().prctl(option, *arguments), f"prctl {option}")


def _number(name: str) -> int:
    table = _NUMBERS.get(os.uname().machine)
    if table is None:
        raise OSError(_ENOSYS, f"{os.uname().machine}: no table of system calls for this machine")
    return table[name]


def unshare(flags: int) -> None:
    """Leaves the namespaces in `flags` for new ones; a new process namespace holds only later children."""
    _checked(_libc().unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    words = [word.encode() or None for word in (source, target, kind)]
    result = _libc().mount(*words, ctypes.c_ulong(flags), options.encode() or None)
    _checked(result, f"mount {source} on {target}")


def make_read_only(target: str) -> None:
    """Makes a mount and all below it read-only, without set-user-id programs and devices. Needs Linux 5.12."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    result = _libc().syscall(_number("mount_setattr"), -100, target.encode(), 0x8000, attributes, 32)
    _checked(result, f"mount_setattr {target}")


def unmount(target: str) -> None:
    """Detaches a mount at once; what is open in it stays usable."""
    _checked(_libc().umount2(target.encode(), _MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Makes the mount `new` the root; the old root appears at `old`, a folder below `new`."""
    result = _libc().syscall(_number("pivot_root"), new.encode(), old.encode())
    _checked(result, "pivot_root")


def new_session_keyring() -> None:
    """Gives up the keys of whoever started this process."""
    _checked(_libc().syscall(_number("keyctl"), _KEYCTL_JOIN_SESSION_KEYRING, None), "keyctl")


def set_dumpable(dumpable: bool) -> None:
    """Whether others of the same user may trace this process and read its memory."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable))


def forbid_new_privileges() -> None:
    """No program started by this process or those that it forks gains anything by its file's owner or capabilities."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def prepare() -> None:
    """Builds, before any fork, the arguments of calls that every child makes: that takes longer than the calls."""
    _drop_capabilities()
    _install_filter()


def set_death_signal(number: int) -> None:
    """The signal that this process gets when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def set_subreaper() -> None:
    """Orphaned descendants become this process's children, not the first process's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def bound_capabilities() -> None:
    """Programs started from now on gain no capability; this process keeps its own, and its forks inherit them."""
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the kernel has no more of them, or this process may not drop them


def become(user: int, group: int) -> None:
    """Takes on a user and group and gives up every capability."""
    if (user, group) != (os.getuid(), os.getgid()):
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    _checked(_drop_capabilities()(), "capset")


@cache
def _drop_capabilities() -> Callable[[], int]:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    return partial(_libc().syscall, _number("capset"), header, (ctypes.c_uint32 * 6)())


class _Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter))]


def can_deny_system_calls() -> bool:
    """Whether there is a table for this machine, so that `deny_system_calls` does what it says."""
    return _filter_program() is not None


def deny_system_calls() -> None:
    """From here on the calls of `_NUMBERS` fail with EPERM; on machines without a table nothing changes.

    A clone with a new namespace fails as well; clone3, whose flags a filter cannot see, fails with ENOSYS, so that C
    libraries fall back to clone.
    """
    install = _install_filter()
    if install is not None:
        _checked(install(), "seccomp")


@cache
def _install_filter() -> Callable[[], int] | None:
    program = _filter_program()
    if program is None:
        return None
    words = [ctypes.c_ulong(2), ctypes.c_void_p(ctypes.addressof(program)), ctypes.c_ulong(0), ctypes.c_ulong(0)]
    return partial(_libc().prctl, _PR_SET_SECCOMP, *words)


@cache
def _filter_program() -> _Program | None:
    table = _NUMBERS.get(os.uname().machine)
    if table is None:
        return None
    load, jump_equal, jump_at_least, jump_any, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS, 0x80000000
    spaces = NEW_MOUNTS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_USER | NEW_PIDS | NEW_NET
    own = ("audit", "clone", "clone3", "capset")
    code = [(load, 0, 0, 4), (jump_equal, 1, 0, table["audit"]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(jump_at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # x32, the same calls under other numbers
    for name, number in table.items():
        if name not in own:
            code += [(jump_equal, 0, 1, number), (answer, 0, 0, refuse)]
    code += [(jump_equal, 0, 1, table["clone3"]), (answer, 0, 0, absent)]
    code += [(jump_equal, 0, 3, table["clone"]), (load, 0, 0, 16), (jump_any, 0, 1, spaces), (answer, 0, 0, refuse)]
    code += [(answer, 0, 0, allow)]
    return _Program(len(code), (_Filter * len(code))(*(_Filter(*line) for line in code)))
