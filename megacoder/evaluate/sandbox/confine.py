"""What a new process does just before it becomes the program: set limits, drop privileges, close files."""

import errno
import os
import resource
import signal
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from megacoder.evaluate.sandbox import kernel

__all__ = [
    "ENVIRONMENT", "HOME", "WORK", "Identity", "KernelLimits", "become_program", "kernel_limits", "take_environment",
]  # fmt: skip

WORK, HOME = "/tmp/work", "/tmp/home"
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}  # fmt: skip
"""The environment of every program, which means the same on any number of cores: libraries compute on one thread, and
threads share two of glibc's arenas. It else reserves 64 MiB for each of eight threads per core, and a program with
many threads meets the limit of its address space on a large machine alone."""
_MIB = 1 << 20

Identity = tuple[int, int]
"""User and group id that programs run as."""
KernelLimits = list[tuple[int, tuple[int, int]]]
"""(resource, (soft, hard))"""


def become_program(argv: list[str], limits: KernelLimits, mark: int, secret: bytes, *,
                   confined: bool, identity: Identity | None, work: str) -> NoReturn:  # fmt: skip
    """Turns this freshly forked process into the program; never returns, exits with 126 where it cannot.

    It keeps this process's environment (see `take_environment`). Everything that can be is prepared before the fork:
    each page that a new process touches costs it a page fault.
    """
    try:
        _close_all_but(mark)
        for number, values in limits:
            resource.setrlimit(number, values)
        if confined:
            _drop_privileges(identity)
        os.chdir(work)
        if argv[0] == "<python>":
            _run_python(argv[1:], mark, secret, work)
        os.close(mark)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error}\n".encode())
    finally:
        os._exit(126)


def take_environment(environment: dict[str, str]) -> None:
    """Makes `environment` that of this process and of those that it forks."""
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _close_all_but(mark: int) -> None:
    os.closerange(3, mark)
    os.closerange(mark + 1, 1024)


def kernel_limits(limits: dict[str, Any], *, confined: bool) -> KernelLimits:
    """Limits that the kernel enforces on a process; the overseer's own are met first, so that it can say which it was.

    Outside a user namespace the limit of processes counts all processes of the user, so those already there are added.
    """
    disk, memory = limits["disk_mb"] * _MIB, limits["memory_mb"] * _MIB
    seconds = int(limits["seconds"]) + 2
    chosen = {"CORE": 0, "CPU": seconds, "FSIZE": disk, "NOFILE": 512, "NPROC": 2 * limits["processes"]}
    if not confined:
        chosen["NPROC"] += _tasks_of_user()
    if sys.platform == "linux":
        chosen |= {"MSGQUEUE": 0, "MEMLOCK": _MIB, "SIGPENDING": 1024, "NICE": 0, "RTPRIO": 0}
    if limits["address_space"]:
        chosen["AS"] = memory + 1024 * _MIB
    found: KernelLimits = []
    for name, value in chosen.items():
        number = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(number)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        found.append((number, (value, value + 1 if name == "CPU" and hard == resource.RLIM_INFINITY else value)))
    return found


def _tasks_of_user() -> int:
    """Processes and threads that run as this user; 0 where there is no /proc."""
    count = 0
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        with suppress(OSError):  # it has ended
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"{entry.path}/task"))
    return count


def _drop_privileges(identity: Identity | None) -> None:
    kernel.become(*(identity or (os.getuid(), os.getgid())))
    kernel.deny_system_calls()
    kernel.set_dumpable(True)  # it may read its own entries in /proc


def _run_python(argv: list[str], mark: int, secret: bytes, work: str) -> NoReturn:
    """Runs a file as a module; once it has run to its end, and not before, `secret` is written to `mark`.

    Its `__name__` is not `__main__`, as in the published harnesses, which `exec` it: an answer's own main, such as one
    that reads input, stays out. `sys.modules` has it as `__main__` too, where `unittest.main` looks for test cases.
    A program that ends the process itself has not proven that the tests after its code were reached. (One that is
    written to deceive may search the interpreter's frames for `secret`: code in the process of its judge can.)
    """
    code = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Python's default, whatever the overseer set
        sys.argv = argv
        sys.path[:0] = [work]
        with open(argv[0], encoding="utf-8") as file:
            source = file.read()
        module = ModuleType("program")
        module.__dict__.update(__file__=argv[0], __builtins__=__builtins__)
        sys.modules[module.__name__] = sys.modules["__main__"] = module
        exec(compile(source, argv[0], "exec"), module.__dict__)
        sys.stdout.flush()
        os.write(mark, secret)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        os.write(mark, _limit_met(error))
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def _limit_met(error: BaseException) -> bytes:
    """The limit that an exception indicates, as the overseer names it; empty for any other."""
    if isinstance(error, MemoryError):
        return b"memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG):
        return b"disk"
    no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    if no_thread or (isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN):
        return b"processes"
    return b""
