"""Weight gradients wait only where they raise no peak, and are added up in the order of the schedule."""

import itertools

import pytest

from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.simulate import Costs, makespan
from megacoder.parallel.schedules.validate import check_schedule, live_activations
from megacoder.parallel.schedules.waiting import limit_waiting

SPLIT = ("zb-h1", "zbv", "dualpipev")


def build(name, num_ranks, num_microbatches):
    return build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def limited(schedule, share, layers=None):
    layers = layers or [1] * schedule.stage_map.num_stages
    return limit_waiting(schedule, layers=layers, waiting_share=share)


def written(schedule):
    return [" ".join(map(str, actions)) for actions in schedule.ranks]


def most_layers(schedule, share, layers):
    """Held by the rank that holds most, each action's own activations included."""
    most = 0.0
    for stages, actions in zip(schedule.stage_map.stages, schedule.ranks, strict=True):
        whole = waiting = 0
        for op, _, chunk in actions:
            size = layers[stages[chunk]]
            whole += size if op == "F" else -size if op in "BI" else 0
            waiting += {"I": size, "W": -size}.get(op, 0)
            most = max(most, whole + share * waiting)
    return most


def directions(actions):
    """Its forwards and backwards in order, whatever happens to the weight gradients."""
    return [action._replace(op="B" if action.op == "I" else action.op) for action in actions if action.op != "W"]


def weight_gradients(actions, chunk):
    return [action.microbatch for action in actions if action.op in "BW" and action.chunk == chunk]


def test_two_ranks_by_hand():
    schedule = build("zb-h1", 2, 3)
    assert limited(schedule, 1.0) == schedule, "what waits is no more than what a forward keeps"
    assert written(limited(schedule, 16.0)) == written(build("1f1b", 2, 3))
    assert written(limited(schedule, 2.0)) == [
        "F0.0 F1.0 B0.0 F2.0 B1.0 I2.0 W2.0",
        "F0.0 I0.0 W0.0 F1.0 I1.0 W1.0 F2.0 I2.0 W2.0",
    ], "the last rank never holds two microbatches, so that one W may wait until the next forward"


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_the_peak_is_that_of_forwards_and_nothing_else_changes(name, num_ranks):
    for num_microbatches, share in itertools.product(range(1, 3 * num_ranks + 2), (0.5, 1.2, 1.41, 2.68, 16.1)):
        schedule = build(name, num_ranks, num_microbatches)
        for layers in ([1] * schedule.stage_map.num_stages, [4 - s % 3 for s in range(schedule.stage_map.num_stages)]):
            found = limited(schedule, share, layers)
            check_schedule(found)
            assert most_layers(found, share, layers) <= most_layers(schedule, 0.0, layers) + 1e-9
            for before, after in zip(schedule.ranks, found.ranks, strict=True):
                assert directions(before) == directions(after)
                for chunk in range(schedule.num_chunks):
                    assert weight_gradients(before, chunk) == weight_gradients(after, chunk)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in SPLIT])
def test_schedules_that_postpone_nothing_stay_as_they_are(name):
    schedule = build(name, 4, 8)
    assert limited(schedule, 16.1) == schedule


def test_stages_without_layers_may_wait():
    schedule = build("zbv", 2, 6)
    waiting = [
        max(live.waiting for live in live_activations(actions))
        for actions in limited(schedule, 16.1, layers=[0, 0, 0, 0]).ranks
    ]
    assert waiting == [max(live.waiting for live in live_activations(actions)) for actions in schedule.ranks]


@pytest.mark.parametrize("name", SPLIT)
def test_it_idles_less_than_if_nothing_waited(name):
    schedule = build(name, 4, 16)
    costs = Costs.uniform(schedule.stage_map.num_stages)
    postponed, some, none = (makespan(limited(schedule, share), costs) for share in (0.0, 2.68, 1e9))
    assert postponed < some < none
