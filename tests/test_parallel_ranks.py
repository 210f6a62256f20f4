"""The pool of ranks that multi-rank tests rely on: what it reports, and that it survives every failure."""

import contextlib
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import wait_until
from ranks import RankFailed, RankPool, fork_server

from megacoder.parallel.collectives import all_reduce_sum, barrier


def place(world, factor):
    return world.rank, world.size, world.group.size(), dist.get_world_size(), world.rank * factor


def raise_on(world, rank):
    if world.rank == rank:
        raise ValueError(f"no such thing on {world.rank}")
    barrier(world.group)


def die_on(world, rank):
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier(world.group)


def wait_without(world, rank):
    if world.rank != rank:
        all_reduce_sum(torch.ones(3), world.group)


def return_what_cannot_travel(world):
    return lambda: None


def process_id(world):
    return os.getpid()


@pytest.mark.parametrize("size", [1, 3, 2, 4])
def test_results_come_back_in_rank_order(ranks, size):
    assert ranks.run(size, place, 10) == [(rank, size, size, size, 10 * rank) for rank in range(size)]


def test_processes_stay_until_a_call_fails(ranks):
    before = ranks.run(3, process_id)
    assert ranks.run(3, process_id) == before
    with pytest.raises(RankFailed):
        ranks.run(2, raise_on, 0)
    after = ranks.run(3, process_id)
    assert not set(before) & set(after)


def test_an_exception_names_its_rank_and_brings_its_traceback(ranks):
    with pytest.raises(RankFailed) as failure:
        ranks.run(3, raise_on, 1)
    assert str(failure.value).startswith("rank 1 of 3 failed in raise_on\n")
    assert "rank 1 raised ValueError: no such thing on 1\nTraceback" in str(failure.value)
    assert 'raise ValueError(f"no such thing on {world.rank}")' in str(failure.value)
    assert "rank 2 had not answered; it was in barrier (" in str(failure.value)


def test_a_hang_names_the_ranks_and_where_they_wait(ranks):
    with pytest.raises(RankFailed, match="rank 1 of 3 failed in wait_without") as failure:
        ranks.run(3, wait_without, 0, timeout_seconds=3.0)
    lines = str(failure.value).splitlines()[1:]
    assert [line.split(";")[0] for line in lines] == ["rank 1 had not answered", "rank 2 had not answered"]
    for line in lines:
        assert re.search(r"it was in \w+ \(shared_memory.py:\d+\)", line)
        assert " < all_reduce_sum (collectives.py:" in line
        assert " < wait_without (test_parallel_ranks.py:" in line


def test_a_death_is_named_before_other_failures(ranks):
    with pytest.raises(RankFailed, match=r"^rank 2 of 3 failed in die_on\n(.*\n)*rank 2 ended with SIGKILL"):
        ranks.run(3, die_on, 2)


def test_ranks_of_their_own_may_be_killed(ranks):
    mine = set(ranks.run(3, process_id))
    outcomes = ranks.run_apart(3, die_on, 1)
    assert outcomes[1].exit_code == -signal.SIGKILL
    for survivor in (outcomes[0], outcomes[2]):
        assert survivor.failure.startswith("raised megacoder.core.errors.RankLost: ")
        assert survivor.exit_code is None
    assert set(ranks.run(3, process_id)) == mine
    apart = ranks.run_apart(2, process_id)
    assert [outcome.failure for outcome in apart] == [None, None]
    assert not mine & {outcome.result for outcome in apart}


def test_a_result_that_cannot_be_pickled_is_a_failure(ranks):
    with pytest.raises(RankFailed, match=r"(?s)failed in return_what_cannot_travel\n.*lambda"):
        ranks.run(1, return_what_cannot_travel)


@pytest.mark.parametrize("size", [0, 17])
def test_a_pool_has_one_to_sixteen_ranks(ranks, size):
    with pytest.raises(ValueError, match=f"{size} ranks: a pool has 1 to 16"):
        ranks.run(size, process_id)


def hang_and_tell(world, folder):
    (folder / str(world.rank)).write_text(str(os.getpid()))
    barrier(world.group)
    if world.rank == 0:
        time.sleep(600)
    barrier(world.group)


def session(folder):
    """Two pools that hang: the first until this process is interrupted, the second until it is killed."""
    tempfile.tempdir = str(folder)  # a killed session cannot remove its own
    for name in ("SIGINT", "SIGKILL"):
        with contextlib.suppress(KeyboardInterrupt), RankPool() as pool:
            pool.run(2, hang_and_tell, folder / name)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes from /proc")
def test_no_rank_outlives_an_interrupted_or_killed_session(tmp_path):
    process = fork_server().Process(target=session, args=(tmp_path,))
    for name in ("SIGINT", "SIGKILL"):
        (tmp_path / name).mkdir()
    process.start()
    for name in ("SIGINT", "SIGKILL"):
        pids = [int(wait_for(tmp_path / name / str(rank))) for rank in range(2)]
        assert all(map(is_alive, pids))
        os.kill(process.pid, signal.Signals[name])
        wait_until(lambda pids=pids: not any(map(is_alive, pids)))
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def wait_for(path):
    wait_until(lambda: path.exists() and path.read_text())
    return path.read_text()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
