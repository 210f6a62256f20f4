"""Every use of the network is noted in the journal, and its failures are reported as a lost rank."""

import datetime
import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from megacoder.core.errors import RankLost
from megacoder.parallel import collectives
from megacoder.parallel.collectives import journal_of
from megacoder.parallel.journal import Journal
from megacoder.parallel.world import World, new_group


def every_operation(world):
    """(what was noted, waiting afterwards) of each function that communicates, in a group of ranks 1 and 2."""
    group = new_group([[0], [1, 2]], world, name="tp")
    if group is None:
        return []
    one, two = torch.zeros(3), torch.zeros(6, dtype=torch.bfloat16)
    peer = 2 - world.rank
    calls = [
        lambda: collectives.all_reduce_sum(one, group),
        lambda: collectives.all_gather_into(two, two[:3].clone(), group),
        lambda: collectives.start_all_reduce_sum(one, group).wait(),
        lambda: collectives.start_reduce_scatter_sum(two[:3].clone(), two, group).wait(),
        lambda: collectives.start_all_gather(two, two[:3].clone(), group).wait(),
        lambda: collectives.barrier(group),
        lambda: collectives.broadcast_from_first(one, group),
        lambda: collectives.start_send(one, peer, group).wait(),
        lambda: collectives.start_receive(one, peer, group).wait(),
    ]
    if world.rank == 2:
        calls[-2:] = reversed(calls[-2:])  # one sends first and the other receives
    noted = []
    for call in calls:
        moves = world.journal.moves
        call()
        assert world.journal.moves > moves
        noted.append((str(world.journal.operation), world.journal.waiting))
    return noted


def test_every_operation_is_noted_with_global_ranks(ranks):
    alone, first, second = ranks.run(3, every_operation)
    sums = ["all-reduce of 3 float32", "reduce-scatter of 6 bfloat16", "all-gather of 6 bfloat16"]
    both = [f"{name} over ranks 1, 2" for name in [sums[0], sums[2], *sums, "barrier", "broadcast of 3 float32"]]
    receive = "receive of 3 float32 from rank"
    assert alone == []
    assert first == [(name, False) for name in [*both, "send of 3 float32 to rank 2", f"{receive} 2"]]
    assert second == [(name, False) for name in [*both, f"{receive} 1", "send of 3 float32 to rank 1"]]


def journals(world):
    group = new_group([list(range(world.size))], world, name="dp")
    same = [journal_of(group), journal_of(None), World(0, 1, 0, world.device, None).journal, world.journal]
    noted = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return len({id(journal) for journal in same}), noted() is None


def test_all_groups_share_one_journal_that_keeps_none_alive(ranks):
    assert ranks.run(2, journals) == [(1, True)] * 2


def wait_for_one_who_does_not_come(world):
    world = World(world.rank, world.size, 0, world.device, world.group, timeout=datetime.timedelta(seconds=3))
    group = new_group([list(range(world.size))], world, name="dp")
    try:
        if world.rank == 0:
            collectives.barrier(group)
    except RankLost as error:
        return str(error), world.journal.waiting
    finally:
        collectives.barrier(world.group)
    return None


def test_groups_have_the_timeout_of_their_world(ranks):
    (message, waiting), other = ranks.run(2, wait_for_one_who_does_not_come)
    assert message == "barrier over ranks 0, 1 failed: Timed out waiting 3000ms for recv operation to complete"
    assert waiting
    assert other is None


def gather_in_wrong_shape(world):
    with pytest.raises(RuntimeError, match="size"):
        collectives.all_gather_into(torch.zeros(5), torch.zeros(3), world.group)


def test_a_wrong_call_is_not_a_lost_rank(ranks):
    ranks.run(2, gather_in_wrong_shape)


def test_place():
    journal = Journal()
    assert journal.place() == "starting"
    journal.begin_step(5)
    journal.at("reading data")
    assert journal.place() == "step 5, reading data"
    journal.at("forward", 0)
    journal.at("update")
    assert journal.place() == "step 5, microbatch 0, update"
    journal.begin_step(6)
    assert journal.microbatch is None
