"""A rank that dies or hangs ends the whole run in time, with one line that names it; real processes under torchrun."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import wait_until
from kill_test import descendants
from train_cases import make_case

from megacoder.core.errors import RankLost
from megacoder.core.processes import kill_sibling
from megacoder.parallel.bulletin import Bulletin
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.journal import CHECKPOINT
from megacoder.parallel.watch import Watch
from megacoder.parallel.world import World
from megacoder.train.metrics_log import read_metrics

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
TIMEOUT = 8.0
"""Ranks that start beside those of other runs may be seconds apart."""
LIMIT = 240
"""Far above the time-out, below torchrun's and gloo's own patience put together: only a run that hangs gets there."""
AT_ONCE = 5
NO_ANSWER = r"has not answered for \d+ s; last seen in "
STUCK = r"has been stuck for \d+ s in "
FAULTS = {
    # name: (faulty_worker's FAULT RANK STEP PLACE, settings, what the line says after naming the rank)
    "kill": (("kill", "1", "3", "forward 1"), {}, NO_ANSWER + "step 3, microbatch 1, forward "),
    "stop": (("stop", "1", "3", "forward 1"), {}, NO_ANSWER + "step 3, microbatch 1, forward "),
    "data": (("stall", "0", "3", "reading data"), {}, STUCK + "step 3, reading data "),
    "stage": (
        ("stall", "0", "3", "forward 2"), {"parallel": ParallelConfig(pp=2)},
        STUCK + r"step 3, microbatch 2, forward \(pipeline.py:\d+ in compute\)",
    ),
    "unnoticed": (("stall unnoticed", "1", "3", "backward 0"), {}, STUCK + "step 3, microbatch 0, backward "),
    "blocked": (
        ("kill, others blocked", "1", "3", "forward 1"), {"timeout_seconds": 120.0},
        NO_ANSWER + "step 3, microbatch 1, forward ",
    ),
    "asked late": (
        ("kill, others asked late", "1", "3", "forward 1"), {}, NO_ANSWER + "step 3, microbatch 1, forward ",
    ),
    "slow disk": (
        ("kill, disk hangs", "1", "3", "forward 1"), {}, NO_ANSWER + "step 3, microbatch 1, forward ",
    ),
    "fail": (("fail", "1", "3", "forward 1"), {}, ""),
    "fail alike": (("fail", "every", "3", "forward 1"), {"parallel": ParallelConfig(tp=2)}, ""),
}  # fmt: skip


@dataclass
class Ended:
    """A run that is over."""

    code: int
    lines: list[str]
    """of megacoder's ranks"""
    folder: Path
    exit_codes: set[int]
    """of the ranks, as torchrun lists them"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("watch"))


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def ended(case):
    """Several faults at once, since most of their time goes by waiting."""
    with ThreadPoolExecutor(AT_ONCE) as runs:
        return dict(zip(FAULTS, runs.map(partial(end_of, case), FAULTS), strict=True))


def end_of(case, name):
    fault, settings, _ = FAULTS[name]
    toml = case.toml(name, **{"timeout_seconds": TIMEOUT, **settings})
    process = torchrun("-m", "faulty_worker", *fault, "train", toml)
    try:
        _, output = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return Ended(
        process.returncode,
        [line for line in output.splitlines() if line.startswith("megacoder: ")],
        case.folder / name,
        {int(code) for code in re.findall(r"exitcode +: (-?\d+)", output)},
    )


@pytest.mark.parametrize("name", [name for name in FAULTS if not name.startswith("fail")])
def test_one_line_names_the_rank_and_what_it_did(ended, name):
    (_, rank, _, _), _, said = FAULTS[name]
    run, other = ended[name], 1 - int(rank)
    assert run.code != 0
    assert len(run.lines) == 1, run.lines
    assert re.match(rf"megacoder: rank {rank} \(host \S+, pid \d+\) {said}", run.lines[0]), run.lines[0]
    assert f"; rank {other} at step 3, microbatch " in run.lines[0]
    waited = {"stage": "receive of 2,048 float32 from rank 0", "blocked": "microbatch 1, forward"}
    assert waited.get(name, "over ranks 0, 1") in run.lines[0].partition(f"; rank {other} at ")[2]


def test_the_waiting_rank_leaves_a_flight_record(ended):
    folder = ended["data"].folder / "flight"
    assert ended["data"].lines[0].endswith(f"torch's flight records are in {folder}")
    assert json.loads((folder / "rank-00001.json").read_text())["entries"]


@pytest.mark.parametrize("name", ["fail", "fail alike"])
def test_a_rank_with_its_own_error_reports_only_that_and_all_ranks_end_with_its_code(ended, name):
    assert ended[name].lines == ["megacoder: the disk is gone"]
    assert ended[name].exit_codes == {1}, "neither that of a lost rank, nor a signal during Python's shutdown"


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_a_rank_killed_from_outside_under_the_launcher(case):
    toml = case.toml("launcher", timeout_seconds=60.0, steps=100_000, checkpoint_every=100_000)
    command = [sys.executable, "-m", "megacoder", "train", str(toml), "--nproc", "2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(read_metrics(case.folder / "launcher" / "metrics.jsonl")) >= 3, LIMIT)
    (victim,) = [pid for pid in descendants(process.pid) if b"RANK=1" in environment_of(pid)]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=LIMIT)
    assert time.monotonic() - began < 55, "its end was noticed, not waited for"
    lines = [line for line in stderr.splitlines() if line.startswith("megacoder: ")]
    assert len(lines) == 2, stderr
    assert f"pid {victim}) has not answered" in lines[0]
    assert (
        lines[1]
        == "megacoder: rank 1 of 2 ended with SIGKILL; if nobody sent it, the machine may have run out of memory"
    )
    assert process.returncode == 1
    assert "Traceback" not in stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_watch_allows_for_work_that_cannot_hang(device, tmp_path):
    world = World(0, 2, 0, torch.device(device), None)
    watch, journal = Watch(world, timeout_seconds=1.0, folder=tmp_path), world.journal
    assert not watch._may_hang(), "what comes before the first step has no bound"
    journal.begin_step(1)
    journal.at("forward", 0)
    assert watch._may_hang() == (device == "cuda"), "on a GPU the host waits where it needs a result"
    journal.at(CHECKPOINT)
    assert not watch._may_hang()
    journal.waiting = True
    assert watch._may_hang()


@pytest.fixture
def watch(tmp_path):
    """Rank 0's of two, with a store of its own and little patience."""
    watch = Watch(World(0, 2, 0, torch.device("cpu"), None), timeout_seconds=1.0, folder=tmp_path)
    watch._bulletin._store = dist.HashStore()
    watch._bulletin._connected.set()
    watch._patience = 0.01
    return watch


def test_the_process_does_not_end_between_an_announcement_and_its_line(watch, monkeypatch):
    happened, announce = [], watch._bulletin.announce

    def announce_and_let_another_thread_leave(end):
        announced = announce(end)
        leaving = threading.Thread(target=watch._leave, args=(RankLost("told by the other thread", told=True),))
        leaving.start()
        leaving.join(0.5)  # it waits for the line
        happened.append(leaving)
        return announced

    monkeypatch.setattr(watch._bulletin, "announce", announce_and_let_another_thread_leave)
    monkeypatch.setattr("megacoder.parallel.watch.say", happened.append)
    monkeypatch.setattr("os._exit", happened.append)
    error = watch._conclude("receive failed")
    happened.pop(0).join()
    assert happened == [f"megacoder: {error}", RankLost.exit_code]
    assert error.told


def test_the_main_thread_that_has_failed_ends_the_process(watch, monkeypatch):
    monkeypatch.setattr("os._exit", pytest.fail)
    watch._failed = True
    watch._leave(RankLost("the other thread's"))


def test_two_threads_that_are_cut_off_say_so_once(watch, monkeypatch):
    said = []
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("megacoder.parallel.watch.say", said.append)
    assert all(watch._cut_off(failure).told for failure in ("receive failed", "out of touch"))
    assert len(said) == 1


SEEN = {"living": (3, 4), "silent": (3, 3), "never seen": (None, None), "seen late": (None, 1), "beat fails": (3, 4)}
"""Beats of rank 1 in two looks."""


@pytest.mark.parametrize("name", SEEN)
def test_a_rank_asked_to_stop_looks_for_others_that_are_silent(watch, monkeypatch, name):
    own = (8, 8) if name == "beat fails" else (8, 9)
    looks = [
        {rank: dataclasses.replace(watch._record(), rank=rank, beat=beat) for rank, beat in enumerate(beats) if beat}
        for beats in zip(own, SEEN[name], strict=True)
    ]
    monkeypatch.setattr(watch._bulletin, "two_looks", lambda seconds: looks)
    assert (watch._looks_at_silence() is not None) == (name in ("silent", "never seen"))


def test_a_rank_is_known_before_it_begins(monkeypatch, tmp_path):
    """However slowly its store connects."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    connect = Bulletin.connect
    monkeypatch.setattr(Bulletin, "connect", lambda *arguments: (time.sleep(0.3), connect(*arguments)))
    with Watch(World(0, 2, 0, torch.device("cpu"), None), timeout_seconds=4.0, folder=tmp_path) as watch:
        assert 0 in watch._bulletin.records()


def test_only_a_sibling_is_killed():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        assert not kill_sibling(child.pid), "a child is none"
        assert not kill_sibling(1 << 30)
        script = f"import sys; from megacoder.core.processes import kill_sibling; sys.exit(kill_sibling({child.pid}))"
        assert subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=False).returncode == 1
        assert child.wait(timeout=LIMIT) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()
