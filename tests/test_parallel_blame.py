"""Which rank is at fault, from tables of journal records."""

import dataclasses

import pytest

from megacoder.parallel.blame import Record, find_loss

RANKS = 4


def record(rank, **changes):
    """One that waits in a collective and answers."""
    plain = Record(
        rank=rank, host=f"h{rank // 2}", pid=100 + rank, beat=7, time=1000.0, step=5, microbatch=2, moves=90,
        place="step 5, microbatch 2, forward", operation="receive of 8 float32 from rank 9", waiting=True,
        still_seconds=4.0, where="",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def loss(after, *, before=None, own=0, size=RANKS):
    """Of ranks whose beat grows from 7 to 8, but for those that `after` leaves at 7."""
    after = {rank: record(rank, beat=8) for rank in range(size)} | after
    after = {rank: value for rank, value in after.items() if value is not None}
    if before is None:
        before = {rank: record(rank) for rank in after}
    return find_loss(after[own], "all-reduce failed", before, after, size=size, now=1012.4)


WORKING = {"beat": 8, "waiting": False, "still_seconds": 6.0, "where": "reader.py:4 in read", "operation": None}
STUCK = "rank 1 (host h0, pid 101) has been stuck for 6 s in "
SILENT = "rank 2 (host h1, pid 102) has not answered for 12 s"
PLACE = "step 5, microbatch 2, forward"
CASES = {
    "silent": ({2: record(2)}, f"{SILENT}; last seen in {PLACE}, waiting in receive of 8 float32 from rank 9; rank 0"),
    "silent before stuck": ({1: record(1, **WORKING), 2: record(2)}, f"{SILENT}; last seen in"),
    "two silent": ({2: record(2), 3: record(3)}, f"{SILENT} (nor 1 more of the 4 ranks); last seen in"),
    "silent and never seen": ({1: None, 2: record(2)}, f"{SILENT} (nor 1 more of the 4 ranks); last seen in"),
    "never seen": ({3: None}, "rank 3 has not answered since the run began; rank 0 at"),
    "stuck": ({1: record(1, **WORKING)}, f"{STUCK}{PLACE} (reader.py:4 in read), last operation none; rank 0 at"),
    "stuck longest": (
        {1: record(1, **WORKING), 3: record(3, **{**WORKING, "still_seconds": 5.5})}, STUCK,
    ),
    "all wait": (
        {2: record(2, beat=8, microbatch=1, moves=95), 3: record(3, beat=8, microbatch=1, moves=94)},
        "all ranks wait for each other; furthest behind is rank 3 (host h1, pid 103) in",
    ),
    "before the first step": (
        {3: record(3, beat=8, step=None, microbatch=None)}, "all ranks wait for each other; furthest behind is rank 3 ",
    ),
    "busy": ({1: record(1, **{**WORKING, "still_seconds": 0.3})}, f"rank 0 at {PLACE}: all-reduce failed; all other"),
    "finished": ({1: record(1, **WORKING), 2: record(2, finished=True)}, STUCK),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_line_begins_with_the_fault(case):
    after, begins = CASES[case]
    line = loss(after).line
    assert line.startswith(begins), line
    assert "rank 0 at step 5, microbatch 2, forward: all-reduce failed" in line, (
        "what the rank itself met is always said"
    )


def test_only_silent_ranks_are_killed():
    assert [record.rank for record in loss({1: record(1, **WORKING), 2: record(2)}).silent] == [2]
    assert loss({1: record(1, **WORKING)}).silent == ()


def test_a_rank_never_blames_itself():
    own = record(1)  # its own beat did not grow between the looks
    assert "furthest behind is rank 0 " in loss({1: own, 0: record(0, beat=8, step=4)}, own=1).line


def test_a_rank_that_published_between_two_checks_is_not_silent():
    before = {rank: record(rank) for rank in (0, 1, 3)}
    assert loss({2: record(2, beat=1)}, before=before).silent == ()


def test_a_single_rank_reports_its_own_failure():
    assert loss({}, size=1).line == "rank 0 at step 5, microbatch 2, forward: all-reduce failed"
