"""Programs that try to break out of the sandbox, take the machine down or pass without solving anything.

Each is a short Python program with the verdict that it must get. `BAIT` stands for facts of the host that a test fills
in: a folder with a secret, ports and sockets with listeners. An attack prints what it got hold of.
"""

from dataclasses import dataclass

__all__ = ["ATTACKS", "Attack"]

PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, b"MC-ATTACK")  # the name that the test looks for among the host's processes
def must_fail(action, *words):
    try:
        result = action(*words)
    except (OSError, ValueError, subprocess.SubprocessError):
        return
    raise SystemExit(f"{words} got {result!r}")
def refused(number, *words):
    if libc.syscall(number, *words) >= 0:
        raise SystemExit(f"system call {number} worked")
"""


@dataclass(frozen=True)
class Attack:
    code: str
    verdicts: tuple[str, ...]

    @property
    def source(self) -> str:
        return PRELUDE + self.code


def attack(verdicts: str, code: str) -> Attack:
    return Attack(code, tuple(verdicts.split(", ")))


ATTACKS = {
    # too much of something
    "fork bomb": attack("processes", "while True: os.fork()"),
    "fork bomb of a shell": attack(
        "processes, time, ended early", "os.execvp('bash', ['bash', '-c', 'f(){ f|f& f; };f'])"
    ),
    "thread bomb": attack("processes", "while True: threading.Thread(target=time.sleep, args=(9,)).start()"),
    "bomb of other programs": attack("processes", "while True: subprocess.Popen(['/bin/sleep', '9'])"),
    "zombies": attack("processes", "while True:\n  if os.fork() == 0: os._exit(0)"),
    "memory, piece by piece": attack("memory", "kept = []\nwhile True: kept.append(bytearray(1 << 22))"),
    "memory at once": attack("memory", "bytearray(1 << 42)"),
    "memory of many processes": attack(
        "memory", "for _ in range(4): os.fork()\nkept = bytearray(os.urandom(1 << 20)) * 20\ntime.sleep(9)"
    ),
    "shared memory": attack("memory", "import mmap\nm = mmap.mmap(-1, 1 << 30)\nwhile True: m.write(b'x' * (1 << 20))"),
    "memory without a name": attack("failed", "fd = os.memfd_create('x')\nwhile True: os.write(fd, b'x' * (1 << 20))"),
    "memory of System V": attack("passed", "for i in range(9): refused(29, 0, 1 << 25, 0o1600)"),
    "memory in message queues": attack("passed", "refused(240, b'/q', 0o102, 0o600, 0)"),
    "one large file": attack("disk", "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * (1 << 20))"),
    "many files": attack("disk", "for n in range(10**6): open(f'/tmp/{n}', 'w').close()"),
    "a file with a hole": attack("disk", "open('x', 'wb').truncate(1 << 40)"),
    "shared memory as files": attack("disk", "f = open('/dev/shm/x', 'wb')\nwhile True: f.write(b'x' * (1 << 20))"),
    "output": attack("output", "while True: print('x' * 1000)"),
    "errors": attack("output", "while True: os.write(2, b'x' * 4096)"),
    "output of a child": attack(
        "output, passed", "if os.fork() == 0:\n  while True: os.write(1, b'x' * 4096)\ntime.sleep(0.2)"
    ),
    "loop that ignores signals": attack(
        "time",
        "for n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
        "while True: pass",
    ),
    "loop of many processes": attack("time", "for _ in range(3): os.fork()\nwhile True: pass"),
    "waiting that ignores SIGTERM": attack("time", "signal.signal(15, signal.SIG_IGN)\nwhile True: time.sleep(1)"),
    # outliving the run
    "daemon": attack(
        "passed", "if os.fork() == 0:\n  os.setsid()\n  if os.fork(): os._exit(0)\n  while True: time.sleep(1)"
    ),
    "daemon that holds the output": attack(
        "passed", "if os.fork() == 0:\n  os.setsid()\n  signal.signal(1, signal.SIG_IGN)\n  time.sleep(99)"
    ),
    "daemon that forks on": attack(
        "passed, processes",
        "if os.fork() == 0:\n  while True:\n    os.setsid() if os.getpgid(0) != os.getpid() else 0\n"
        "    if os.fork(): os._exit(0)",
    ),
    # reading what is none of its business
    "home folder": attack(
        "passed",
        "for top in (BAIT['home'], os.path.expanduser('~'), '/root', '/home', os.path.dirname(BAIT['home'])):\n"
        "  for name in os.listdir(top) if os.path.isdir(top) else ():\n"
        "    path = os.path.join(top, name)\n    print(path)\n    if os.path.isfile(path): print(open(path).read())\n"
        "must_fail(open, BAIT['home'] + '/secret')",
    ),
    "environment": attack(
        "passed",
        "print(os.environ)\n"
        "for who in os.listdir('/proc'):\n  try: print(open(f'/proc/{who}/environ').read())\n  except OSError: pass",
    ),
    "names of the machine": attack(
        "passed",
        "assert socket.gethostname() == 'sandbox'\n"
        "for line in open('/proc/self/cgroup'): assert line.rstrip().endswith(':/'), line",
    ),
    "memory of the overseer": attack(
        "passed",
        "must_fail(open, '/proc/1/mem', 'rb')\nmust_fail(open, '/proc/1/maps')\nmust_fail(os.listdir, '/proc/1/fd')",
    ),
    "other processes": attack("passed", "assert len([n for n in os.listdir('/proc') if n.isdigit()]) == 2"),
    "root of the overseer": attack(
        "passed",
        "must_fail(os.listdir, '/proc/1/root')\nmust_fail(os.listdir, '/proc/1/cwd')\n"
        "print(os.listdir('/proc/self/root/../..'))\nmust_fail(open, '/proc/self/root' + BAIT['home'] + '/secret')",
    ),
    "open files": attack(
        "ended early",
        "for fd in range(3, 1024):\n  for act in (lambda: os.write(fd, b'passed'), lambda: print(os.read(fd, 99))):\n"
        "    try: act()\n    except OSError: pass\nos._exit(0)",
    ),
    # writing outside
    "system files": attack(
        "passed",
        "for path in ('/etc/passwd', '/usr/x', '/x', '/bin/sh', '/dev/x', '/proc/sys/kernel/core_pattern',\n"
        "  '/proc/sysrq-trigger', '/proc/self/oom_score_adj', '/proc/1/oom_score_adj'): must_fail(open, path, 'w')\n"
        "must_fail(os.mkdir, BAIT['home'] + '/x')",
    ),
    "symbolic link": attack(
        "passed",
        "os.symlink(BAIT['home'] + '/secret', 'x')\nmust_fail(open, 'x')\nmust_fail(open, 'x', 'a')\n"
        "os.symlink('/', 'top')\nmust_fail(os.mkdir, 'top/made')",
    ),
    "hard link": attack(
        "passed", "must_fail(os.link, '/etc/passwd', 'x')\nmust_fail(os.link, BAIT['home'] + '/secret', 'y')"
    ),
    "mounts": attack(
        "passed", "refused(165, b'none', b'/', b'', 32 | 4096, 0)\nrefused(166, b'/proc', 2)\nrefused(161, b'/tmp')"
    ),
    "device files": attack("passed", "must_fail(os.mknod, 'disk', 0o60666, os.makedev(254, 0))"),
    # the network
    "TCP": attack(
        "passed",
        "for where in (('127.0.0.1', BAIT['tcp']), ('1.1.1.1', 53)): must_fail(socket.create_connection, where, 2)",
    ),
    "UDP": attack(
        "passed",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for where in (('127.0.0.1', BAIT['udp']), ('1.1.1.1', 53)): must_fail(s.sendto, b'x', where)",
    ),
    "raw sockets": attack("passed", "must_fail(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 3)"),
    "Unix socket": attack(
        "passed", "s = socket.socket(socket.AF_UNIX)\nmust_fail(s.connect, BAIT['home'] + '/socket')"
    ),
    "abstract socket": attack(
        "passed", "s = socket.socket(socket.AF_UNIX)\nmust_fail(s.connect, chr(0) + BAIT['abstract'])"
    ),
    # the runner
    "ptrace": attack("passed", "refused(101, 16, 1, 0, 0)\nrefused(101, 0x4206, os.getppid(), 0, 0)"),
    "signals to the parent": attack(
        "passed",
        "for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL, signal.SIGINT):\n"
        "  for who in (1, os.getppid()):\n    try: os.kill(who, number)\n    except OSError: pass",
    ),
    "killing all it may": attack(
        "passed",
        "for who in range(2, 9999):\n  try: who == os.getpid() or os.kill(who, 9)\n  except OSError: pass\n"
        "try: os.kill(-1, 9)\nexcept OSError: pass",
    ),
    "namespaces of its own": attack(
        "passed", "refused(272, 0x10000000)\nrefused(56, 0x10000000 | 17, 0, 0, 0, 0)\nrefused(435, 0, 0)\n"
        "libc.syscall(0x40000000 + 272, 0x10000000)\nassert ctypes.get_errno() == 1",  # x32's numbers
    ),
    "calls of another architecture": attack(
        "crashed, failed",  # getpid, by i386's number and instruction
        "import mmap\ncode = mmap.mmap(-1, 4096, prot=7)\ncode.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()",
    ),
    "doors into the kernel": attack(
        "passed", "refused(321, 0, 0, 0)\nrefused(250, 0, -3, 1)\nrefused(425, 8, 0)\nrefused(298, 0, 0, -1, -1, 0)"
    ),
    "another user": attack(
        "passed",
        "must_fail(os.setuid, 0)\nwho = os.getuid()\nprint(subprocess.run(['su', '-c', 'id'], capture_output=True, "
        "stdin=subprocess.DEVNULL).stdout)\nassert os.getuid() == who",
    ),
    "words into the terminal": attack(
        "passed", "import fcntl\nmust_fail(fcntl.ioctl, 0, 0x5412, b'x')\nmust_fail(open, '/dev/tty')"
    ),
    "a core file": attack("crashed", "os.abort()"),
    # passing without having earned it
    "leaving before the tests": attack("ended early", "os._exit(0)\nassert False"),
    "exit before the tests": attack("ended early", "sys.exit(0)\nassert False"),
    "a forged result": attack(
        "failed",
        "print('passed'); print('{\"verdict\": \"passed\", \"exit_code\": 0}')\nassert False",
    ),
    "another program's exit code": attack("ended early", "os.execv('/bin/true', ['true'])"),
    "result of a child": attack("failed", "if os.fork() == 0: sys.exit(0)\nos.wait()\nassert False"),
}  # fmt: skip
