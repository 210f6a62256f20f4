"""Simulated idle time equals the published formula of every schedule, and an independent simulation agrees."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.simulate import Costs, simulate

SIZES = [(1, 4), (2, 6), (4, 8), (4, 13), (8, 24)]
TIMES = [(1, 1, 1), (2, 3, 2), (10, 11, 9), (4, 5, 3)]


def timeline(name, num_ranks, num_microbatches, times, num_chunks=None):
    schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    forward, input_grad, weight_grad = times
    stages = schedule.stage_map.num_stages
    return simulate(schedule, Costs.uniform(stages, forward=forward, input_grad=input_grad, weight_grad=weight_grad))


def idle(name, *arguments):
    result = timeline(name, *arguments)
    every = {result.idle(rank) for rank in range(result.schedule.num_ranks)}
    assert len(every) == 1, "all ranks do the same work"
    return every.pop()


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("times", TIMES)
def test_idle_time_is_the_published_formula(p, m, times):
    forward, input_grad, weight_grad = times
    backward = input_grad + weight_grad
    assert idle("gpipe", p, m, times) == (p - 1) * (forward + backward)
    assert idle("1f1b", p, m, times) == (p - 1) * (forward + backward)
    assert idle("zb-h1", p, m, times) == (p - 1) * (forward + input_grad - weight_grad)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p in (1, 2, 4, 5) for m in (p, p + 1, 2 * p - 1, 2 * p, 3 * p + 2)])
@pytest.mark.parametrize("v", [2, 3])
def test_interleaving_divides_the_bubble_by_v_even_when_ranks_do_not_divide_microbatches(p, m, v):
    assert idle("interleaved", p, m, (1, 1, 1), v) == 3 * (p - 1)
    work = 3 * m * v
    assert Fraction(3 * (p - 1), work) == Fraction(p - 1, v * m)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 4), (4, 8), (4, 13), (8, 24)])
def test_zbv_has_no_bubble_when_its_three_times_are_equal(p, m):
    result = timeline("zbv", p, m, (1, 1, 1))
    assert [result.bubble(rank) for rank in range(p)] == [0] * p
    assert [result.start[rank][0] for rank in range(p)] == list(range(p))
    assert idle("zbv", p, m, (1, 1, 1)) == p - 1


@pytest.mark.parametrize("times", TIMES)
def test_zero_bubble_schedules_idle_less_than_1f1b_on_four_ranks(times):
    halves = tuple(time / 2 for time in times)  # two chunks share what one stage does
    reference = idle("1f1b", 4, 12, times)
    assert idle("zb-h1", 4, 12, times) < reference
    assert idle("zbv", 4, 12, halves) < idle("zb-h1", 4, 12, times)
    assert idle("dualpipev", 4, 12, halves) < reference


def overlapped_blocks(schedule):
    """DualPipeV's pairs F&B of one block: an F right before a B of the other chunk, where the figure joins them."""
    p, n = schedule.num_ranks, schedule.num_microbatches
    ranks = []
    for rank, actions in enumerate(schedule.ranks):
        rest = iter(actions)
        singles = 2 * (p - 1 - rank) + 2 * (rank + 1) + 3 * (p - 1 - rank)
        shape = [1] * singles + [2] * 2 * (n - 2 * p + rank + 1) + [1, 2] * (p - 1 - rank)
        if rank == p - 1:
            shape[singles : singles + 1] = [1, 1]  # the figure keeps the first pair of the last rank apart
        blocks = [tuple(next(rest) for _ in range(size)) for size in shape]
        ranks.append(blocks + [(action,) for action in rest])
    return ranks


def naive_makespan(schedule, times, blocks=None):
    """Repeated sweeps until nothing moves; a block starts when all its inputs are there and delivers at its end."""
    stages = schedule.stage_map.stages
    last = schedule.stage_map.num_stages - 1
    blocks = blocks or [[(action,) for action in actions] for actions in schedule.ranks]
    position, free, done = [0] * len(blocks), [0] * len(blocks), {}
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(blocks):
            while position[rank] < len(queue):
                block = [(op, microbatch, stages[rank][chunk]) for op, microbatch, chunk in queue[position[rank]]]
                needs = [("F", mb, stage - 1) for op, mb, stage in block if op == "F" and stage > 0]
                needs += [("G", mb, stage + 1) for op, mb, stage in block if op in "BI" and stage < last]
                if not all(need in done for need in needs):
                    break
                free[rank] = max([free[rank], *(done[need] for need in needs)])
                free[rank] += sum(times["I"] + times["W"] if op == "B" else times[op] for op, _, _ in block)
                done.update(
                    {("F" if op == "F" else "G", mb, stage): free[rank] for op, mb, stage in block if op != "W"}
                )
                position[rank] += 1
                moved = True
    assert position == [len(queue) for queue in blocks]
    return max(free)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 10), (4, 16), (8, 20)])
def test_dualpipev_idles_as_published_when_pairs_deliver_at_their_end(p, m):
    schedule = build_schedule("dualpipev", num_ranks=p, num_microbatches=m)
    makespan = naive_makespan(schedule, {"F": 1, "I": 1, "W": 1}, overlapped_blocks(schedule))
    both, backward, weights = 3, 2, 1
    assert makespan - 2 * 3 * m == (p - 1) * (both + backward - 3 * weights)
    assert idle("dualpipev", p, m, (1, 1, 1)) == p - 1


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES)), st.integers(1, 5), st.integers(1, 9),
    st.tuples(*[st.integers(1, 9)] * 3),
)  # fmt: skip
def test_an_independent_simulation_agrees(name, num_ranks, num_microbatches, times):
    result = timeline(name, num_ranks, num_microbatches, times)
    assert result.makespan == naive_makespan(result.schedule, dict(zip("FIW", times, strict=True)))


def test_latency_counts_between_ranks_only():
    vee = build_schedule("zbv", num_ranks=1, num_microbatches=2)
    assert simulate(vee, Costs.uniform(2, latency=100.0)).idle(0) == 0
    line = build_schedule("gpipe", num_ranks=2, num_microbatches=1)
    assert simulate(line, Costs.uniform(2, latency=0.5)).makespan == 2 + 2 * 2 + 2 * 0.5


def test_a_slow_stage_sets_the_pace():
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=8)
    costs = Costs(forward=(1.0, 5.0), input_grad=(1.0, 5.0), weight_grad=(1.0, 5.0))
    result = simulate(schedule, costs)
    assert result.busy(1) == 8 * 15
    assert result.makespan == 1 + 8 * 15 + 2


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"forward": (1.0,), "input_grad": (1.0, 1.0), "weight_grad": (1.0,)}, "needs one of each per stage"),
        ({"forward": (1.0,), "input_grad": (0.0,), "weight_grad": (1.0,)}, "stage 0 are F, I, W = (1.0, 0.0, 1.0)"),
        ({"forward": (float("nan"),), "input_grad": (1.0,), "weight_grad": (1.0,)}, "stage 0"),
        ({"forward": (1.0,), "input_grad": (1.0,), "weight_grad": (1.0,), "latency": -1.0}, "latency -1.0"),
    ],
)
def test_impossible_costs_are_refused(costs, message):
    with pytest.raises(ConfigError) as error:
        Costs(**costs)
    assert message in str(error.value)


def test_costs_of_another_number_of_stages_are_refused():
    with pytest.raises(ConfigError, match="costs of 3 stages for a schedule of 2"):
        simulate(build_schedule("1f1b", num_ranks=2, num_microbatches=1), Costs.uniform(3))
