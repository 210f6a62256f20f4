"""Programs: sends match receives in order, whatever the costs, and the proof notices when they do not."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.program import Exchange, Recv, Send, build_program, check_program
from megacoder.parallel.schedules.schedule import Action, ScheduleError, StageTensor
from megacoder.parallel.schedules.simulate import Costs


def build(name, num_ranks, num_microbatches):
    return build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def transfers(instructions):
    return [transfer for item in instructions if isinstance(item, Exchange) for transfer in item.transfers]


def edited(program, rank, instructions):
    ranks = list(program.ranks)
    ranks[rank] = tuple(instructions)
    return replace(program, ranks=tuple(ranks))


def test_two_ranks_by_hand():
    activation, gradient = StageTensor("activation", 0, 1), StageTensor("gradient", 0, 0)
    program = build_program(build("1f1b", 2, 1))
    assert program.ranks == (
        (Action("F", 0), Exchange((Send(activation, 1), Recv(gradient, 1))), Action("B", 0)),
        (Exchange((Recv(activation, 0),)), Action("F", 0), Action("B", 0), Exchange((Send(gradient, 0),))),
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 2), (2, 1), (3, 5), (4, 3), (4, 8)])
def test_each_pair_of_ranks_sees_its_transfers_in_one_order(name, num_ranks, num_microbatches):
    schedule = build(name, num_ranks, num_microbatches)
    program = build_program(schedule)
    check_program(program)
    crossing = 0
    for source in range(num_ranks):
        for target in range(num_ranks):
            sent = [t.tensor for t in transfers(program.ranks[source]) if t[1] == target and isinstance(t, Send)]
            received = [t.tensor for t in transfers(program.ranks[target]) if t[1] == source and isinstance(t, Recv)]
            assert sent == received
            assert source != target or not sent
            crossing += len(sent)
    homes = [rank for rank, _ in schedule.stage_map.home]
    assert crossing == 2 * num_microbatches * sum(a != b for a, b in pairwise(homes))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 8), st.data())
def test_any_costs_give_a_program_that_cannot_deadlock(name, num_ranks, num_microbatches, data):
    schedule = build(name, num_ranks, num_microbatches)
    stages = schedule.stage_map.num_stages
    times = st.lists(st.floats(0.01, 100), min_size=stages, max_size=stages).map(tuple)
    costs = Costs(
        forward=data.draw(times),
        input_grad=data.draw(times),
        weight_grad=data.draw(times),
        latency=data.draw(st.floats(0, 50)),
    )
    check_program(build_program(schedule, costs))


def test_64_ranks_with_1024_microbatches():
    program = build_program(build("1f1b", 64, 1024))
    check_program(program)
    late = list(program.ranks[40])
    late.append(late.pop(find(late, Recv)))
    with pytest.raises(ScheduleError, match=r"rank 40 runs F0\.0 before it received its activation"):
        check_program(edited(program, 40, late))


def test_adjacent_transfers_are_one_exchange():
    for instructions in build_program(build("zbv", 4, 8)).ranks:
        assert not any(isinstance(a, Exchange) and isinstance(b, Exchange) for a, b in pairwise(instructions))


def find(instructions, kind, nth=0):
    """Index of the nth exchange that holds one transfer of `kind` only."""
    return [
        i
        for i, item in enumerate(instructions)
        if isinstance(item, Exchange) and [type(t) for t in item.transfers] == [kind]
    ][nth]


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, r"rank 0 sends .* before it made it"), (1, r"rank 1 runs F0\.0 before it received its activation")],
)
def test_a_transfer_on_the_wrong_side_of_its_action_is_rejected(rank, message):
    program = build_program(build("gpipe", 2, 3))
    first, second, *rest = program.ranks[rank]
    with pytest.raises(ScheduleError, match=message):
        check_program(edited(program, rank, [second, first, *rest]))


def test_a_lost_receive_is_a_deadlock_or_a_mismatch():
    program = build_program(build("1f1b", 2, 4))
    instructions = list(program.ranks[1])
    del instructions[find(instructions, Recv)]
    with pytest.raises(ScheduleError, match="before it received"):
        check_program(edited(program, 1, instructions))
    instructions = list(program.ranks[1])
    del instructions[find(instructions, Send, -1)]
    with pytest.raises(ScheduleError, match=r"deadlock of transfers: rank 0 at Recv"):
        check_program(edited(program, 1, instructions))


def test_two_sends_that_wait_for_each_other_are_a_deadlock():
    """NCCL, when both ranks of 1F1B's steady state send first: each waits for a receive behind the other's send."""
    program = build_program(build("1f1b", 2, 4))
    send_first = [
        [Exchange(tuple(sorted(i.transfers, key=lambda t: isinstance(t, Recv)))) if isinstance(i, Exchange) else i
         for i in instructions]
        for instructions in program.ranks
    ]  # fmt: skip
    with pytest.raises(ScheduleError, match="meets"):
        check_program(replace(program, ranks=tuple(map(tuple, send_first))))


def test_receives_in_another_order_are_rejected():
    program = build_program(build("gpipe", 2, 4))
    instructions = list(program.ranks[0])
    receive = next(i for i, item in enumerate(instructions) if any(isinstance(t, Recv) for t in transfers([item])))
    other = next(
        i for i, item in enumerate(instructions) if i > receive and any(isinstance(t, Recv) for t in transfers([item]))
    )
    instructions[receive], instructions[other] = instructions[other], instructions[receive]
    with pytest.raises(ScheduleError, match=r"rank 0 (at .* meets|runs B)"):
        check_program(edited(program, 0, instructions))


def test_the_actions_are_those_of_the_schedule():
    program = build_program(build("gpipe", 2, 2))
    instructions = [item for item in program.ranks[0] if item != Action("B", 1)]
    with pytest.raises(ScheduleError, match="the program of rank 0 does not hold the actions"):
        check_program(edited(program, 0, instructions))
