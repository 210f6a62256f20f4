"""Ranks of one host exchange tensors through memory: bit-exact sums, waits in any order, no silent loss of a rank.

`test_parallel_collectives` tests what the collectives promise, through shared memory too.
"""

import datetime
import os
import signal
import socket
import time

import pytest
import torch

from megacoder.core.errors import RankLost
from megacoder.parallel import collectives, one_host
from megacoder.parallel.collectives import (
    all_gather_into,
    all_reduce_sum,
    barrier,
    start_all_gather,
    start_all_reduce_sum,
    start_receive,
    start_reduce_scatter_sum,
    start_send,
    sum_with_peer,
)
from megacoder.parallel.world import World, gather_json, new_group

SIZES = [2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32]
LENGTHS = [1, 3, 100, 1000, 300_001]


def draw(rank, length, dtype, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(length, generator=generator).to(dtype)
    return torch.randint(-1000, 1000, (length,), generator=generator).to(dtype)


def reference(rows):
    """The sum in rank order, in fp32 at least, rounded once."""
    wide = torch.promote_types(rows[0].dtype, torch.float32) if rows[0].dtype.is_floating_point else rows[0].dtype
    total = rows[0].to(wide)
    for row in rows[1:]:
        total = total + row.to(wide)
    return total.to(rows[0].dtype)


def in_memory(group):
    """What ranks share; that they do is what the tests rely on."""
    memory = collectives.note_of(group).memory
    assert memory is not None
    return memory


def every_collective(world, dtype, lengths):
    """Of tensors drawn by rank: results of all three, for each length."""
    in_memory(world.group)
    results = []
    for length in lengths:
        summed = draw(world.rank, length, dtype)
        all_reduce_sum(summed.view(1, -1, 1), world.group)
        shard, full = torch.empty(length, dtype=dtype), draw(world.rank, world.size * length, dtype)
        start_reduce_scatter_sum(shard.view(-1, 1), full.view(-1, 1), world.group).wait()
        assert torch.equal(full, draw(world.rank, world.size * length, dtype)), "the others' slices are left alone"
        start_reduce_scatter_sum(full[world.rank * length :][:length], full, world.group).wait()
        assert torch.equal(full[world.rank * length :][:length], shard)
        gathered = torch.empty(world.size * length, dtype=dtype)
        all_gather_into(gathered.view(-1, 1), draw(world.rank, length, dtype).view(-1, 1), world.group)
        results.append((summed, shard, gathered))
    return results


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_the_reference_to_the_bit(ranks, size, dtype):
    for rank, results in enumerate(ranks.run(size, every_collective, dtype, LENGTHS)):
        for length, (summed, shard, gathered) in zip(LENGTHS, results, strict=True):
            parts = [draw(other, length, dtype) for other in range(size)]
            assert torch.equal(summed, reference(parts))
            wholes = [draw(other, size * length, dtype) for other in range(size)]
            assert torch.equal(shard, reference(wholes)[rank * length :][:length])
            assert torch.equal(gathered, torch.cat(parts))


def memory_after(world, steps):
    """How far into its arena a rank gets in steps of a dozen collectives under way, each of 128,000 bytes."""
    memory = in_memory(world.group)
    furthest = 0
    for _ in range(steps):
        pendings = [start_all_reduce_sum(torch.ones(32_000), world.group) for _ in range(12)]
        furthest = max(furthest, *(end for _, end in memory._arena._extents))
        for pending in pendings:
            pending.wait()
    return furthest


def test_memory_is_used_again(ranks):
    for furthest in ranks.run(3, memory_after, 20):
        assert furthest <= 2 * 12 * 128_000, "what one step used is free in the next but one, at the latest"


def many_under_way(world, order):
    """Thirty collectives, waited for in an order that depends on the rank."""
    in_memory(world.group)
    pendings, expected = [], []
    for number in range(30):
        length = 1 + 97 * number * (1 + number % 3)
        parts = [draw(rank, length, torch.float32, number) for rank in range(world.size)]
        if number % 2:
            pendings.append(start_all_reduce_sum(parts[world.rank].clone(), world.group))
            expected.append(reference(parts))
        else:
            pendings.append(start_all_gather(torch.empty(world.size * length), parts[world.rank], world.group))
            expected.append(torch.cat(parts))
    places = list(range(30))
    if order == "backwards":
        places.reverse()
    elif order == "by rank" and world.rank % 2:
        places = places[1::2] + places[::2]
    return [torch.equal(pendings[place].wait(), expected[place]) for place in places]


@pytest.mark.parametrize("order", ["forwards", "backwards", "by rank"])
def test_many_concurrent_operations_can_be_waited_for_in_any_order(ranks, order):
    assert ranks.run(3, many_under_way, order) == [[True] * 30] * 3


def wait_elsewhere(world, elsewhere):
    """Rank 0 waits for rank 1, which waits for what rank 0 has started and not waited for: no deadlock."""
    in_memory(world.group)
    other = new_group([list(range(world.size))], world, name="dp")
    started = start_all_reduce_sum(torch.full((100_000,), world.rank + 1.0), world.group)
    elsewhere_done = {
        "all-reduce": lambda: all_reduce_sum(torch.zeros(5), other),
        "barrier": lambda: barrier(world.group),
        "group": lambda: new_group([list(range(world.size))], world, name="tp"),
        "transfer": lambda: sum_with_peer(torch.zeros(5), 1 - world.rank, world.group),
    }[elsewhere]
    if world.rank == 0:
        elsewhere_done()
        return started.wait()[0].item()
    result = started.wait()[0].item()
    elsewhere_done()
    return result


@pytest.mark.parametrize("elsewhere", ["all-reduce", "barrier", "group", "transfer"])
def test_a_started_collective_completes_while_its_rank_waits_elsewhere(ranks, elsewhere):
    assert ranks.run(2, wait_elsewhere, elsewhere, timeout_seconds=20.0) == [3.0, 3.0]


def interleaved_groups(world):
    """A 2 x 2 mesh, whose axes have collectives under way at the same time."""
    tp = new_group([[0, 1], [2, 3]], world, name="tp")
    dp = new_group([[0, 2], [1, 3]], world, name="dp")
    results = []
    for number in range(5):
        first = start_all_reduce_sum(torch.full((5000,), 10.0**world.rank), tp)
        second = start_all_reduce_sum(torch.full((5000 + number,), 10.0**world.rank), dp)
        third = start_all_reduce_sum(torch.full((3,), 10.0**world.rank), tp)
        waits = [second, third, first] if world.rank % 3 else [first, second, third]
        values = {id(pending): set(pending.wait().tolist()) for pending in waits}
        results.append([values[id(pending)] for pending in (first, second, third)])
    return results


def test_groups_of_a_mesh_do_not_mix(ranks):
    for rank, results in enumerate(ranks.run(4, interleaved_groups)):
        along_tp = {10.0**rank + 10.0 ** (rank ^ 1)}
        along_dp = {10.0**rank + 10.0 ** (rank ^ 2)}
        assert results == [[along_tp, along_dp, along_tp]] * 5


def numbered(rank, number, length):
    return torch.stack([torch.arange(length + number) + 100.0 * rank, torch.full((length + number,), number)], dim=1)


def pass_on(world, length):
    """Each rank sends to the next what it has from the one before, many at a time, between collectives."""
    in_memory(world.group)
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for _ in range(3):
        sends = [start_send(numbered(world.rank, n, length).t(), after, world.group) for n in range(9)]
        summing = start_all_reduce_sum(torch.ones(length), world.group)
        receives = [start_receive(torch.empty(2, length + n), before, world.group) for n in range(9)]
        for number in (8, *range(8)):
            assert torch.equal(receives[number].wait(), numbered(before, number, length).t())
        assert (summing.wait() == world.size).all()
        for send in sends:
            send.wait()
    memory = in_memory(world.group)
    barrier(world.group)
    memory._hear_all()
    return len(memory._arena._extents)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1, 100_000])
def test_sends_arrive_in_order_during_collectives(ranks, size, length):
    assert ranks.run(size, pass_on, length) == [1] * size, "all that was sent has been read; one collective is unread"


def add_with_peer(world):
    tensor = draw(world.rank, 1000, torch.float32)
    sum_with_peer(tensor, 1 - world.rank, world.group)
    return tensor


def test_sum_with_peer_is_the_same_on_both(ranks):
    first, second = ranks.run(2, add_with_peer)
    assert torch.equal(first, second)
    assert torch.equal(first, draw(0, 1000, torch.float32) + draw(1, 1000, torch.float32))


def more_messages_than_a_pipe_holds(world):
    if world.rank:
        time.sleep(1.0)
    pendings = [start_all_reduce_sum(torch.ones(1), world.group) for _ in range(5000)]
    return {pending.wait().item() for pending in pendings}


def test_more_messages_than_a_pipe_holds(ranks):
    assert ranks.run(3, more_messages_than_a_pipe_holds) == [{3.0}] * 3


def awkward_tensors(world, shared):
    """What becomes of tensors that are not contiguous, require gradients or are empty."""
    world = World(world.rank, world.size, 0, world.device, world.group)
    if not shared:
        collectives.note_of(world.group).memory = None
    outcomes = []
    strided = torch.arange(12.0).view(3, 4).t()
    for call in (
        lambda: all_reduce_sum(strided, world.group),
        lambda: all_reduce_sum(torch.empty(0), world.group),
        lambda: all_gather_into(torch.empty(8), torch.arange(8.0)[::2], world.group),
        lambda: all_gather_into(torch.zeros(5), torch.zeros(3), world.group),
        lambda: all_gather_into(torch.zeros(6), torch.zeros(3, dtype=torch.float64), world.group),
    ):
        try:
            call()
            outcomes.append("ends")
        except (RuntimeError, ValueError) as error:
            outcomes.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    return outcomes, strided


def test_tensors_outside_shared_memory_go_through_gloo(ranks):
    for (ours, our_tensor), (theirs, their_tensor) in zip(
        ranks.run(2, awkward_tensors, True), ranks.run(2, awkward_tensors, False), strict=True
    ):
        assert ours == theirs
        assert torch.equal(our_tensor, their_tensor)


def sum_with_gradient(world):
    tensor = torch.ones(4, requires_grad=True)
    doubled = tensor * 2
    all_reduce_sum(doubled, world.group)
    return doubled.detach()


def test_a_tensor_with_a_graph_is_summed(ranks):
    assert all((result == 4).all() for result in ranks.run(2, sum_with_gradient))


def differ_in_size(world):
    with pytest.raises(RuntimeError, match=r"takes part with 1\d bytes where this rank has 1\d: their calls differ"):
        all_reduce_sum(torch.ones(3 + world.rank), world.group)
    barrier(world.group)


def test_calls_that_differ_are_refused(ranks):
    ranks.run(2, differ_in_size)


def die_after_a_start(world):
    """What the others get of the sum that rank 1 had started, and of the next."""
    in_memory(world.group)
    tensor = torch.ones(100_000)
    started = start_all_reduce_sum(tensor, world.group)
    if world.rank == 1:
        started.wait()  # until then another may still be about to start, and would meet its end there
        os.kill(os.getpid(), signal.SIGKILL)
    total = started.wait()[-1].item()
    try:
        all_reduce_sum(tensor, world.group)
    except RankLost as error:
        return total, str(error)
    return None


def test_a_killed_rank_is_noticed_at_once(ranks):
    first, second, third = ranks.run_apart(3, die_after_a_start)
    assert second.exit_code == -signal.SIGKILL
    for outcome in (first, third):
        assert outcome.failure is None, outcome.failure
        total, message = outcome.result
        assert total == 3.0
        assert message.startswith("all-reduce of 100,000 float32 over ranks 0, 1, 2 failed: rank ")
        assert message.endswith(" has closed the connection")  # and not that a time-out is over


def do_not_come(world, what):
    world = World(world.rank, world.size, 0, world.device, world.group, timeout=datetime.timedelta(seconds=3))
    group = new_group([list(range(world.size))], world, name="dp")
    tensor = torch.ones(100)
    try:
        if world.rank == 0:
            {
                "sum": lambda: all_reduce_sum(tensor, group),
                "receive": lambda: start_receive(tensor, 1, group).wait(),
            }[what]()
    except RankLost as error:
        return str(error), world.journal.waiting
    finally:
        barrier(world.group)
    return None


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("sum", "all-reduce of 100 float32 over ranks 0, 1"),
        ("receive", "receive of 100 float32 from rank 1"),
    ],
)
def test_a_rank_that_does_not_come_is_a_timeout(ranks, what, name):
    (message, waiting), other = ranks.run(2, do_not_come, what)
    assert message == f"{name} failed: Timed out after 3 s waiting for rank 1"
    assert waiting
    assert other is None


def refuse(world, step, refusing):
    """Whether all ranks share nothing where one fails in `step`, and the sum that they form all the same."""
    if world.rank == refusing:

        def fail(*args):
            raise OSError("no")

        setattr(one_host._Meeting, step, fail)
    group = new_group([list(range(world.size))], world, name="dp")
    tensor = torch.ones(3)
    all_reduce_sum(tensor, group)
    return collectives.note_of(group).memory is None, tensor.tolist()


@pytest.mark.parametrize("step", ["open", "call", "answer", "listen"])
@pytest.mark.parametrize("refusing", [0, 2])
def test_no_rank_uses_shared_memory_if_one_cannot(step, refusing, ranks):
    for outcome in ranks.run_apart(3, refuse, step, refusing):
        assert outcome.failure is None
        assert outcome.result == (True, [3.0] * 3)


def meet_a_stranger(world):
    """Rank 0 is called by a process that is none of the group, before rank 1 calls."""
    if world.rank == 1:
        call = one_host._Meeting.call

        def call_twice(self):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.connect(one_host._address(self.cards[0][: one_host.TOKEN_BYTES]))
                stranger.send(b"x" * one_host.TOKEN_BYTES)
            return call(self)

        one_host._Meeting.call = call_twice
    group = new_group([[0, 1]], world, name="dp")
    tensor = torch.ones(3)
    all_reduce_sum(tensor, group)
    return collectives.note_of(group).memory is not None, tensor.tolist()


def test_a_process_outside_the_group_is_ignored(ranks):
    for outcome in ranks.run_apart(2, meet_a_stranger):
        assert outcome.failure is None
        assert outcome.result == (True, [2.0] * 3)


def switch_off(world):
    world = World(world.rank, world.size, 0, world.device, world.group, shared_memory=False)
    group = new_group([list(range(world.size))], world, name="dp")
    values = gather_json(world.rank, world)
    return collectives.note_of(group).memory is None, values


def test_shared_memory_can_be_switched_off(ranks):
    assert ranks.run(2, switch_off) == [(True, [0, 1])] * 2


def descriptors_after(world, times):
    counts = []
    for _ in range(times):
        group = new_group([list(range(world.size))], world, name="dp")
        all_reduce_sum(torch.ones(1000), group)
        torch.distributed.destroy_process_group(group)
        del group
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[0] == counts[-1]


def test_a_destroyed_group_leaves_no_descriptors(ranks):
    assert ranks.run(2, descriptors_after, 4) == [True, True]
