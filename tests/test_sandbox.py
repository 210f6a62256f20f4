"""The sandbox: attacks are contained and named, neighbours are not disturbed, nothing is left behind."""

import ast
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import wait_until
from sandbox_attacks import ATTACKS

from megacoder.core.errors import ConfigError
from megacoder.evaluate.sandbox import kernel
from megacoder.evaluate.sandbox.confine import kernel_limits
from megacoder.evaluate.sandbox.host import Launcher, Sandbox, SandboxError
from megacoder.evaluate.sandbox.languages import LANGUAGES, Toolchain, find_toolchain, installed_languages
from megacoder.evaluate.sandbox.program import PRELOADED_PYTHON, Limits, Outcome, Program, Step, as_message
from megacoder.evaluate.sandbox.view import tool_folder

SECRET = "planted-8c1f"
LIMITS = Limits(seconds=0.4, memory_mb=160, processes=24, disk_mb=8, output_kb=64)
HONEST = "total = sum(range(1000))\nprint(total)\nassert total == 499500"


def python(source: str, limits: Limits = LIMITS) -> Program:
    step = Step(argv=(PRELOADED_PYTHON, "main.py"), limits=limits)
    return Program(files={"main.py": source}, steps=(step,))


def run_one(sandbox: Sandbox, program: Program) -> Outcome:
    [(_, outcome)] = sandbox.run([(0, program)])
    return outcome


@pytest.fixture(scope="module")
def sandbox():
    try:
        with Sandbox(workers=2) as started:
            yield started
    except SandboxError as error:
        pytest.skip(str(error))


class Bait:
    """What attacks are after: a secret in a file and in the environment, and listeners that must hear nothing."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        (folder / "secret").write_text(SECRET)
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.name = f"megacoder-test-{os.getpid()}-{folder.name}"
        self.unix.bind(str(folder / "socket"))
        self.abstract.bind("\0" + self.name)
        for listener in (self.unix, self.abstract):
            listener.listen()

    def facts(self) -> str:
        ports = {"tcp": self.tcp.getsockname()[1], "udp": self.udp.getsockname()[1]}
        return f"BAIT = { ({'home': str(self.home), 'abstract': self.name} | ports)!r}\n"

    def assert_untouched(self) -> None:
        assert sorted(os.listdir(self.home)) == ["secret", "socket"]
        assert (self.home / "secret").read_text() == SECRET
        for listener in (self.tcp, self.udp, self.unix, self.abstract):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.recv(1) if listener is self.udp else listener.accept()
            listener.close()


def names_of_processes() -> list[str]:
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:
            continue  # it has ended
    return names


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """{name: outcome} of every attack, two at a time with honest programs between them."""
    bait = Bait(tmp_path_factory.mktemp("home"))
    os.environ["MEGACODER_SECRET"] = SECRET
    before = set(os.listdir(tempfile.gettempdir()))
    programs = {}
    for name, attack in ATTACKS.items():
        programs[name] = python(bait.facts() + attack.source)
        programs["beside: " + name] = python(HONEST)
    try:
        with Sandbox(workers=2) as sandbox:
            outcomes = dict(sandbox.run(programs.items()))
            left = names_of_processes()
    except SandboxError as error:
        pytest.skip(str(error))
    finally:
        del os.environ["MEGACODER_SECRET"]
    assert "MC-ATTACK" not in left
    new = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in new if name in ("x", "work", "home") or name.isdigit()]
    bait.assert_untouched()
    return outcomes


def test_there_are_forty_attacks_and_each_reaches_its_target():
    assert len(ATTACKS) >= 40
    assert len({attack.code for attack in ATTACKS.values()}) == len(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_contained_and_named(attacked, name):
    outcome = attacked[name]
    assert outcome.verdict in ATTACKS[name].verdicts, (outcome.describe(), outcome.stdout[-300:], outcome.stderr[-900:])
    assert SECRET not in outcome.stdout + outcome.stderr


@pytest.mark.parametrize("name", ATTACKS)
def test_an_honest_program_passes_during_an_attack(attacked, name):
    outcome = attacked["beside: " + name]
    assert (outcome.verdict, outcome.stdout, outcome.stderr) == ("passed", "499500\n", "")


def test_a_program_holds_no_privilege_and_can_gain_none(sandbox):
    """Several of these would each stop the attacks above, so that none of them shows that one is missing."""
    outcome = run_one(sandbox, python("print(open('/proc/self/status').read())\nopen('/proc/self/maps').close()"))
    assert outcome.passed, outcome.describe()
    status = dict(line.split(":", 1) for line in outcome.stdout.splitlines() if line)
    assert [int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == [0] * 5
    assert status["NoNewPrivs"].strip() == "1"
    assert (status["Seccomp"].strip() == "2") is kernel.can_deny_system_calls()
    if os.geteuid() == 0:
        assert status["Uid"].split() == status["Gid"].split() == ["1000"] * 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may leave its groups")
def test_a_program_is_in_none_of_our_groups():
    before = os.getgroups()
    os.setgroups([*before, 4])
    try:
        with Sandbox() as sandbox:
            outcome = run_one(sandbox, python("import os; print(os.getgroups())"))
    except SandboxError as error:
        pytest.skip(str(error))
    finally:
        os.setgroups(before)
    assert outcome.stdout == "[]\n"


def test_all_that_is_shown_is_read_only(sandbox):
    """Where root starts the sandbox, its files are closed to programs anyway; where a user does, they are his."""
    read_only = ["/", "/usr", os.path.dirname(os.__file__)] + ["/proc"] * (sandbox.mode == "namespaces")
    code = (
        f"import os\nfor path in {read_only}: assert os.statvfs(path).f_flag & os.ST_RDONLY, path\n"
        f"for path in {[*read_only, '/tmp', '/dev/shm']}: assert os.statvfs(path).f_flag & os.ST_NOSUID, path"
    )
    outcome = run_one(sandbox, python(code))
    assert outcome.passed, outcome.describe()


def test_a_program_has_limits_of_the_kernels_own(sandbox):
    """They hold where a program is faster than the overseer."""
    most = {
        "CORE": 0, "CPU": 2, "FSIZE": 8 << 20, "NOFILE": 512, "NPROC": 48, "AS": (160 + 1024) << 20, "MSGQUEUE": 0,
        "MEMLOCK": 1 << 20, "SIGPENDING": 1024, "NICE": 0, "RTPRIO": 0,
    }  # fmt: skip
    numbers = [getattr(resource, f"RLIMIT_{name}") for name in most]
    outcome = run_one(sandbox, python(f"import resource\nprint([resource.getrlimit(n) for n in {numbers}])"))
    for (name, value), (soft, hard) in zip(most.items(), ast.literal_eval(outcome.stdout), strict=True):
        assert 0 <= soft <= value, name  # -1 is no limit
        assert soft <= hard <= value + 1, name


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_forbidden_calls_have_the_kernels_numbers(machine, header):
    if not os.path.exists(header):
        pytest.skip(f"no {header}")
    theirs = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", Path(header).read_text())}
    known = {name: number for name, number in kernel._NUMBERS[machine].items() if name in theirs}
    assert len(known) > 35
    assert known == {name: theirs[name] for name in known}


def test_the_attacks_succeed_without_the_sandbox(tmp_path):
    """The tests above could not fail if the attacks did nothing: run with our own rights, they read the secret."""
    bait = Bait(tmp_path)
    sources = [bait.facts() + ATTACKS[name].source for name in ("home folder", "environment", "system files")]
    with Sandbox(mode="unsafe") as unsafe:
        home = run_one(unsafe, python(sources[0].replace(", '/root', '/home'", "")))
        assert SECRET in home.stdout
        made = run_one(unsafe, python(sources[2].split("for path in")[0] + "os.mkdir(BAIT['home'] + '/x')"))
    assert made.passed
    assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize(
    ("source", "verdict", "detail"),
    [
        ("print('hello')", "passed", ""),
        ("print('x'); raise ValueError('too small')", "failed", "ValueError: too small"),
        ("raise SystemExit(3)", "failed", "exit code 3"),
        ("raise SystemExit('too small')", "failed", "too small"),
        ("import os; os.kill(os.getpid(), 11)", "crashed", "signal 11"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(bytes(80 << 20))", "disk", ""),
        ("def f(:", "failed", "SyntaxError"),
        ("if __name__ == '__main__':\n    input()", "passed", ""),
        ("import pickle\nclass C: pass\npickle.loads(pickle.dumps(C()))", "passed", ""),
        (
            "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.fail('no')\nunittest.main()",
            "failed",
            "FAILED (failures=1)",
        ),
    ],
)
def test_the_outcome_reports_what_a_program_did(sandbox, source, verdict, detail):
    outcome = run_one(sandbox, python(source, Limits(seconds=5)))
    assert outcome.verdict == verdict
    assert detail in outcome.describe()


@pytest.mark.parametrize(
    ("source", "verdict", "detail"),
    [
        ("kill -PIPE $$", "crashed", "signal 13"),  # Python ignores this one and the next
        ("kill -XFSZ $$", "disk", ""),
        ("kill -XCPU $$", "time", ""),
        ("echo 'std::bad_alloc' >&2; kill -ABRT $$", "memory", ""),
        ("head -c 3M /dev/zero > /dev/shm/x", "disk", ""),
        ("while : > /dev/shm/$((n++)); do :; done; exit 1", "disk", ""),
        ("head -c 40K /dev/zero; head -c 40K /dev/zero >&2", "output", ""),
        ("exit 7", "failed", "exit code 7"),
    ],
)
def test_the_outcome_reports_what_a_program_other_than_python_did(sandbox, source, verdict, detail):
    step = Step(argv=("bash", "main.sh"), limits=replace(LIMITS, seconds=5))
    outcome = run_one(sandbox, Program(files={"main.sh": source}, steps=(step,)))
    assert outcome.verdict == verdict
    assert detail in outcome.describe()


def test_what_cannot_be_started_fails(sandbox):
    outcome = run_one(sandbox, Program(files={}, steps=(Step(argv=("no-such-tool",), limits=LIMITS),)))
    assert (outcome.verdict, outcome.exit_code) == ("failed", 126)
    assert "no-such-tool: [Errno 2]" in outcome.describe()


def test_a_program_can_catch_an_interrupt(sandbox):
    source = "import os\ntry:\n  os.kill(os.getpid(), 2)\nexcept KeyboardInterrupt: print('caught')"
    assert run_one(sandbox, python(source)).stdout == "caught\n"


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("time.sleep(0.1)", "passed"),
        ("open('x', 'wb').write(kept); time.sleep(1)", "memory"),
        ("for _ in range(3):\n  if os.fork() == 0: time.sleep(0.1); os._exit(0)\ntime.sleep(0.1)", "passed"),
        ("for _ in range(20): threading.Thread(target=time.sleep, args=(0.1,)).start()", "passed"),
        ("for _ in range(30): threading.Thread(target=time.sleep, args=(1,)).start()\ntime.sleep(1)", "processes"),
    ],
    ids=["memory", "memory and files", "memory that processes share", "threads", "more threads than processes"],
)
def test_what_is_counted_together(sandbox, code, verdict):
    source = f"import os, threading, time\nkept = b'x' * (40 << 20)\n{code}"
    limits = Limits(seconds=5, memory_mb=72, processes=24, disk_mb=48)
    assert run_one(sandbox, python(source, limits)).verdict == verdict


def test_the_room_for_files_is_each_programs_own():
    source = "for name in 'ab': open(name, 'wb').write(b'x' * (6 << 20))"
    with Sandbox(workers=1) as sandbox:
        for size, verdict in ((8, "disk"), (16, "passed")):
            assert run_one(sandbox, python(HONEST, replace(LIMITS, disk_mb=24 - size))).passed  # leaves nothing
            assert run_one(sandbox, python(source, replace(LIMITS, disk_mb=size))).verdict == verdict


def test_the_environment_is_each_programs_own():
    step = Step(argv=(PRELOADED_PYTHON, "main.py"), limits=LIMITS)
    program = Program(files={"main.py": "import os; print(os.environ.get('OWN'))"}, steps=(step,))
    with Sandbox(workers=1) as sandbox:
        outcomes = [run_one(sandbox, replace(program, environment=own)) for own in ({"OWN": "1"}, {})]
    assert [outcome.stdout for outcome in outcomes] == ["1\n", "None\n"]


def test_results_do_not_depend_on_the_number_of_workers():
    sources = [HONEST, "assert False", "while True: pass", "x = bytearray(1 << 40)", "import os; os._exit(0)"]
    seen = []
    for workers in (1, 4):
        with Sandbox(workers=workers) as sandbox:
            outcomes = dict(sandbox.run((index, python(source)) for index, source in enumerate(sources)))
        seen.append([outcomes[index].verdict for index in range(len(sources))])
    assert seen[0] == seen[1] == ["passed", "failed", "time", "memory", "ended early"]


def test_a_program_that_ran_out_of_time_or_memory_is_retried_alone(sandbox):
    slow = python("while True: pass")
    outcomes = dict(sandbox.run([("slow", slow), ("fine", python(HONEST)), ("large", python("bytearray(1 << 42)"))]))
    assert {key: outcome.alone for key, outcome in outcomes.items()} == {"fine": False, "slow": True, "large": True}
    assert next(iter(outcomes)) == "fine"
    first, again = (as_message(slow, alone=alone)["steps"][0] for alone in (False, True))
    assert (again["wall"], again["limits"]) == (2 * first["wall"], first["limits"])


def test_files_of_one_program_are_not_there_for_the_next():
    with Sandbox(workers=1) as sandbox:
        assert run_one(sandbox, python("open('/tmp/left', 'w').write('x'); open('/dev/shm/left', 'w').close()")).passed
        outcome = run_one(sandbox, python("import os; print('left' in os.listdir('/tmp'), os.listdir('/dev/shm'))"))
    assert outcome.stdout == "False []\n"


LEFT_BEHIND = {
    "a file beside its own": "open('more', 'w').close()",
    "a file in the home folder": "open(os.path.expanduser('~/x'), 'w').close()",
    "an empty folder": "os.mkdir('/dev/shm/x')",
    "its own file gone": "os.remove('main.py')",
    "a link in the place of its folder": "os.rename('/tmp/work', '/tmp/w'); os.symlink('/tmp/home', '/tmp/work')",
    "a door wide open": "os.chmod('/tmp', 0o777); os.chmod('/dev/shm', 0o755)",
    "a list of who may enter": (
        "entries = '01000700ffffffff 02000700e8030000 04000000ffffffff 10000000ffffffff 20000000ffffffff'\n"
        "try: os.setxattr('/tmp', 'system.posix_acl_access', bytes.fromhex('02000000' + entries))\n"
        "except OSError: pass  # no such lists here"
    ),
    "a folder that none may enter": "os.mkdir('x'); os.chmod('x', 0)",
    "the working folder locked": "os.chmod('/tmp/work', 0)",
    "nothing": "",
}
LOOK = """import os
for top in ('/tmp', '/dev/shm'):
    for folder, names, files in os.walk(top):
        if os.access(folder, os.W_OK):  # not what is shown there of tools that lie in /tmp
            print(folder, oct(os.stat(folder).st_mode), sorted(names), sorted(files), os.listxattr(folder))
"""


@pytest.mark.parametrize("code", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_every_program_finds_the_same_empty_folders(sandbox, code):
    found = run_one(sandbox, python(LOOK))
    assert found.stdout.count("\n") == 4
    assert "/tmp/work 0o40755 [] ['main.py'] []" in found.stdout
    for _ in range(2):  # on each of the two workers
        for _, outcome in sandbox.run((index, python(f"import os\n{code}")) for index in range(2)):
            assert outcome.passed, outcome.describe()
        assert {outcome.stdout for _, outcome in sandbox.run((index, python(LOOK)) for index in range(2))} == {
            found.stdout
        }


@pytest.mark.parametrize("mode", ["namespaces", "bubblewrap"])
def test_tools_that_lie_in_tmp_are_shown_there_and_cannot_be_changed(mode):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        tool = Path(folder) / "kit" / "bin" / "tool"
        tool.parent.mkdir(parents=True)
        tool.write_text("#!/bin/sh\necho here\necho more >> $0 || echo refused\n")
        tool.chmod(0o777)
        try:
            with Sandbox(workers=1, mode=mode, tools=[str(tool)]) as sandbox:
                for _ in range(2):
                    outcome = run_one(sandbox, Program(files={}, steps=(Step(argv=(str(tool),), limits=LIMITS),)))
                    assert outcome.stdout == "here\nrefused\n", outcome.describe()
        except SandboxError as error:
            pytest.skip(str(error))
        assert tool.read_text().count("more") == 1


@pytest.mark.parametrize("preload", [["colorsys"], []])
def test_a_process_started_ahead_is_used_if_it_fits_and_ends_if_not(sandbox, preload):
    source = python("import sys; assert ('colorsys' in sys.modules) is " + str(preload == ["colorsys"]))
    with closing(Launcher.ahead(["colorsys"])) as ahead, Sandbox(preload=preload, ahead=ahead) as other:
        assert run_one(other, source).passed
        same_mode = (ahead.words[0] == "bwrap") is (other.mode == "bubblewrap")
        assert (other._launchers == [ahead]) is (same_mode and preload == ["colorsys"])
        assert os.getsid(ahead.process.pid) != os.getsid(0)  # Ctrl-C is ours alone
    assert ahead.process.poll() is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_replaced_and_its_program_rerun(workers):
    with Sandbox(workers=workers) as sandbox:
        children = children_of(sandbox._launchers[0].process.pid)
        results = sandbox.run((index, python(HONEST)) for index in range(3 * workers))
        next(results)
        os.kill(children[0], 9)  # the other one holds no end of its socket, so that the end shows
        assert all(outcome.passed for _, outcome in results)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_programs_end_with_the_process_that_started_them():
    code = (
        "import sys, test_sandbox as t; from megacoder.evaluate.sandbox.host import Sandbox\n"
        "s = Sandbox(); print(s._launchers[0].process.pid, flush=True)\n"
        "t.run_one(s, t.python('while True: pass', t.Limits(seconds=60)))"
    )
    env = {**os.environ, "PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    launcher = int(process.stdout.readline())
    time.sleep(0.3)
    process.kill()
    process.wait()
    wait_until(lambda: not Path(f"/proc/{launcher}").exists())


PROGRAMS = {  # right, wrong, and what does not compile
    "python": ("print(6 * 7)", "assert 6 * 7 == 41", None),
    "cpp": (
        '#include <cstdio>\nint main() { printf("42"); }',
        "#include <cassert>\nint main() { assert(1 == 2); }",
        "int main( {",
    ),
    "java": (
        "class Problem { public static void main(String[] a) { System.out.print(42); } }",
        "class Problem { public static void main(String[] a) { assert a.length == 1; } }",
        "class Problem {",
    ),
    "js": ("var x = 42", "require('assert')(false)", None),
    "ts": ("console.log(42)", "throw new Error('no')", "let x: number = 'text' +"),
    "cs": (
        "class M { static void Main() { System.Console.Write(42); } }",
        "class M { static void Main() { System.Diagnostics.Debug.Assert(false); } }",
        "class {",
    ),
    "php": ("<?php echo 42;", "<?php exit(1);", None),
    "sh": ("echo 42", "[ 1 = 2 ]", None),
    "go": (
        'package main_test\nimport ("fmt"; "testing")\nfunc TestIt(t *testing.T) { fmt.Println(42) }',
        'package main_test\nimport "testing"\nfunc TestIt(t *testing.T) { t.Errorf("no") }',
        "package",
    ),
    "rust": ('fn main() { print!("42"); }', "fn main() { assert!(1 == 2); }", "fn main( {"),
    "ruby": ("print 42", "raise 'no'", None),
    "perl": ("print 42", "die 'no'", None),
    "r": ("cat(42)", "stop('no')", None),
    "lua": ("io.write(42)", "error('no')", None),
    "scala": ("object Problem extends App { print(42) }", 'object Problem extends App { sys.error("no") }', "object {"),
    "swift": ("print(42)", 'fatalError("no")', "let ="),
    "julia": ("print(42)", 'error("no")', None),
    "racket": ("#lang racket\n(display 42)", "#lang racket\n(require rackunit)\n(check-equal? 1 2)", None),
    "d": ("import std.stdio; void main() { write(42); }", "unittest { assert(false); } void main() {}", "void {"),
}


def test_programs_cover_every_language():
    assert PROGRAMS.keys() == LANGUAGES.keys()


@pytest.mark.parametrize("language", LANGUAGES)
def test_right_wrong_and_broken_programs_in_each_language(language):
    """`PROGRAMS` holds a program that passes, one that fails and, of compiled languages, one that does not compile."""
    sources = dict(zip(("right", "wrong", "broken"), PROGRAMS[language], strict=True))
    try:
        toolchain = find_toolchain(language)
    except ConfigError as error:
        pytest.skip(str(error))  # names the missing tools
    programs = {kind: toolchain.program(source, seconds=10) for kind, source in sources.items() if source}
    try:
        with Sandbox(workers=2, tools=toolchain.visible) as sandbox:
            outcomes = dict(sandbox.run(programs.items()))
    except SandboxError as error:
        pytest.skip(str(error))
    assert {kind: outcome.passed for kind, outcome in outcomes.items()} == {kind: kind == "right" for kind in programs}
    if not LANGUAGES[language].silent:
        assert outcomes["right"].stdout.split()[0] == "42"  # Go's test programs add a line
    if "broken" in outcomes:
        assert (outcomes["broken"].step, outcomes["broken"].verdict) == (0, "failed"), outcomes["broken"]


def test_a_complaint_on_stderr_fails_a_program_that_exits_with_0(sandbox):
    def script(source: str) -> Program:
        step = Step(argv=("bash", "main.sh"), limits=Limits(seconds=5), complaint=r"^Fail\b")
        return Program(files={"main.sh": source}, steps=(step,))

    assert run_one(sandbox, script("echo Failure >&2; echo no Fail >&2; echo Fail")).passed
    outcome = run_one(sandbox, script("echo x >&2; echo Fail: 3 >&2"))
    assert outcome.describe() == "failed: Fail: 3"


def test_anything_printed_fails_a_program_that_must_be_silent(sandbox):
    def script(source: str) -> Program:
        step = Step(argv=("bash", "main.sh"), limits=Limits(seconds=5), silent=True)
        return Program(files={"main.sh": source}, steps=(step,))

    assert run_one(sandbox, script("true")).passed
    assert run_one(sandbox, script("echo so far")).describe() == "failed: so far"
    assert run_one(sandbox, script("echo so far >&2")).describe() == "failed: so far"


def test_a_compiler_has_limits_of_its_own_and_a_runtime_twice_the_time():
    paths = {"c++": "/x/g++", "java": "/x/java", "javac": "/x/javac", "jars": "."}
    limits = {
        language: [
            step.limits for step in Toolchain(language=LANGUAGES[language], paths=paths).program("", seconds=3).steps
        ]
        for language in ("cpp", "java")
    }
    seen = {key: [(own.seconds, own.processes, own.address_space) for own in steps] for key, steps in limits.items()}
    assert seen == {
        "cpp": [(30.0, 256, False), (3.0, 64, True)],
        "java": [(60.0, 256, False), (6.0, 256, False)],
    }


def test_a_tools_folder_is_neither_the_root_nor_a_home_folder(monkeypatch):
    monkeypatch.setattr(os.path, "realpath", lambda path: path)  # /bin may be a link
    monkeypatch.setenv("HOME", "/home/me")
    tools = ["/bin/tool", "/usr/bin/tool", "/home/me/bin/tool", "/home/me/kit/bin/tool", "/opt/kit/tool"]
    assert [tool_folder(tool) for tool in tools] == ["/bin", "/usr/bin", "/home/me/bin", "/home/me/kit", "/opt/kit"]


def test_openssl_is_linked_where_a_program_includes_it():
    toolchain = Toolchain(language=LANGUAGES["cpp"], paths={"c++": "/x/bin/g++"})
    plain, linked = (toolchain.program(source, seconds=1).steps[0].argv for source in ("", "#include <openssl/md5.h>"))
    assert linked == (*plain, "-lcrypto", "-lssl")


def test_a_jar_is_a_named_library_and_only_it_is_visible():
    language = LANGUAGES["java"]
    without, having = (
        Toolchain(language=language, paths={"java": "/x/bin/java", "javac": "/x/bin/javac", "jars": jars})
        for jars in (".", ".:/a/javatuples-1.2.jar")
    )
    assert without.missing_libraries("import org.javatuples.*;") == ["javatuples, its jar in CLASSPATH"]
    assert without.missing_libraries("import java.util.*;") == []
    assert having.missing_libraries("import org.javatuples.*;") == []
    assert [tool_folder(path) for path in having.visible] == ["/x/bin", "/x/bin", "/a/javatuples-1.2.jar"]


def test_an_unknown_language_and_a_missing_tool_are_named(monkeypatch):
    with pytest.raises(ConfigError, match="language 'cobol': not one of python, cpp"):
        find_toolchain("cobol")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"cpp: g\+\+ or clang\+\+ not installed"):
        find_toolchain("C++")
    assert find_toolchain("py").language.name == "python"
    assert installed_languages() == ["python"]


def test_programs_are_not_run_without_a_working_sandbox(monkeypatch):
    def fail(self, count):
        raise SandboxError("not permitted")

    monkeypatch.setattr(Sandbox, "_start", fail)
    with pytest.raises(SandboxError, match=r"namespaces: not permitted.*--unsafe"):
        Sandbox()


def test_unsafe_runs_with_limits_and_cleans_up():
    with Sandbox(workers=2, mode="unsafe") as sandbox:
        before = set(os.listdir(tempfile.gettempdir()))
        outcomes = dict(
            sandbox.run(
                [
                    ("right", python(HONEST)),
                    ("early", python("import os; os._exit(0)")),
                    ("slow", python("while True: pass")),
                    ("late", python("import time\nwhile time.process_time() < 0.5: pass\nassert False")),
                    ("all of its group", python("import os; os.killpg(0, 9)")),
                    ("daemon", python("import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(99)")),
                ]
            )
        )
        left = [name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("megacoder-")]
    verdicts = {key: outcome.verdict for key, outcome in outcomes.items()}
    assert verdicts == {
        "right": "passed", "early": "ended early", "slow": "time", "late": "time", "all of its group": "crashed",
        "daemon": "passed",
    }  # fmt: skip
    assert not left


def test_processes_that_a_user_has_already_do_not_count_against_a_program():
    """Where no user namespace does, the kernel counts all of them: of a user with a desktop no program could fork."""
    limits = {"disk_mb": 1, "memory_mb": 1, "seconds": 1, "processes": 64, "address_space": False}
    inside, outside = (
        dict(kernel_limits(limits, confined=confined))[resource.RLIMIT_NPROC][0] for confined in (True, False)
    )
    assert inside == 128
    assert outside - inside >= len(os.listdir("/proc/self/task"))


def test_the_package_imports_no_torch():
    code = "import sys, megacoder.evaluate.sandbox.host; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )


def test_outcomes_describe_themselves():
    common = {"step": 0, "stdout": "", "cpu_seconds": 0.0, "wall_seconds": 0.0, "peak_mb": 0.0}
    failed = Outcome(verdict="failed", exit_code=1, signal=None, stderr="a\nE: no\n", **common)
    assert failed.describe() == "failed: E: no"
    assert not failed.passed
