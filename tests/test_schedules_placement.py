"""Layers to stages: even, by hand and by cost; an error names a split that works."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.placement import LayerCosts, Placement, place_by_cost, place_evenly, place_explicitly
from megacoder.parallel.schedules.schedule import StageMap


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [
        (24, 4, [6, 6, 6, 6]),
        (62, 16, [3, *[4] * 14, 3]),
        (62, 8, [7, 8, 8, 8, 8, 8, 8, 7]),
        (7, 3, [2, 3, 2]),
        (5, 4, [1, 1, 2, 1]),
        (3, 5, [0, 1, 1, 1, 0]),
        (4, 5, [1, 1, 1, 1, 0]),
        (5, 1, [5]),
        (3, 2, [2, 1]),
    ],
)
def test_layers_are_placed_evenly(num_layers, num_stages, expected):
    assert list(place_evenly(num_layers, num_stages).layers_per_stage) == expected


def test_a_placement_names_its_layers():
    placement = place_evenly(7, 3)
    assert [list(placement.layers(stage)) for stage in range(3)] == [[0, 1], [2, 3, 4], [5, 6]]
    assert [placement.has_embedding(stage) for stage in range(3)] == [True, False, False]
    assert [placement.has_head(stage) for stage in range(3)] == [False, False, True]
    assert placement.stage_costs(LayerCosts(embedding=0.5, layer=2, head=3)) == (4.5, 6, 7)


def compositions(num_layers, num_stages):
    """Every legal placement."""
    slots = num_layers + 2
    for cuts in combinations(range(1, slots), num_stages - 1):
        sizes = [end - begin for begin, end in pairwise((0, *cuts, slots))]
        sizes[0] -= 1
        sizes[-1] -= 1
        yield Placement(tuple(sizes))


def rank_costs(placement, stage_map, costs):
    stages = placement.stage_costs(costs)
    return [sum(stages[stage] for stage in row) for row in stage_map.stages]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from([StageMap.loop(n) for n in range(1, 7)] + [StageMap.loop(2, 2), StageMap.loop(2, 3)]
                    + [StageMap.vee(n) for n in (1, 2, 3)]),
    st.floats(0, 8), st.floats(0.1, 3), st.floats(0, 20),
)  # fmt: skip
def test_by_cost_is_the_best_of_all(num_layers, stage_map, embedding, layer, head):
    num_layers = max(num_layers, stage_map.num_stages - 2)
    costs = LayerCosts(embedding=embedding, layer=layer, head=head)
    found = place_by_cost(num_layers, stage_map, costs=costs)
    assert sum(found.layers_per_stage) == num_layers
    every = [rank_costs(placement, stage_map, costs) for placement in compositions(num_layers, stage_map.num_stages)]
    ours = rank_costs(found, stage_map, costs)
    assert max(ours) == pytest.approx(min(map(max, every)))
    slowest = min(map(max, every)) * (1 + 1e-8)
    most_even = min(sum(cost**2 for cost in ranks) for ranks in every if max(ranks) <= slowest)
    assert sum(cost**2 for cost in ours) == pytest.approx(most_even)


def test_a_heavy_head_gets_a_stage_of_its_own():
    costs = LayerCosts(embedding=0, layer=1, head=6)
    assert place_by_cost(12, StageMap.loop(3), costs=costs).layers_per_stage == (6, 6, 0)
    assert max(place_evenly(12, 3).stage_costs(costs)) == 10


def test_the_rank_with_the_head_gets_less_in_its_other_stage():
    """Were stages alone evened out, the first would get 3 or 4 layers as the others do, its rank 8 or 9."""
    costs = LayerCosts(embedding=0, layer=1, head=5)
    placement = place_by_cost(23, StageMap.vee(4), costs=costs)
    assert rank_costs(placement, StageMap.vee(4), costs) == [7, 7, 7, 7]
    assert placement.layers_per_stage[0] == 2


def test_by_cost_scales_to_deep_models():
    costs = LayerCosts(embedding=0.1, layer=1, head=1.8)
    placement = place_by_cost(62, StageMap.loop(32), costs=costs)
    assert max(placement.stage_costs(costs)) == pytest.approx(2.1)


def test_layers_are_placed_explicitly():
    assert place_explicitly(5, [0, 3, 2, 0], num_stages=4) == Placement((0, 3, 2, 0))


@pytest.mark.parametrize(
    ("layers", "num_stages", "message"),
    [
        (
            [20, 20, 20],
            3,
            "parallel.layers_per_stage = [20, 20, 20]: places 60 layers of 62; nearest that works: [21, 21, 20]",
        ),
        ([31, 31], 3, "parallel.layers_per_stage = [31, 31]: 2 numbers for 3 stages; nearest that works: [21, 21, 20]"),
        ([31, 0, 31], 3, "only the first and the last stage can be without layers"),
        ([63, -1], 2, "only the first and the last stage can be without layers"),
        ([1] * 62, 65, "65 stages for 62 layers: embedding, layers and head fill at most 64; nearest that works: 64"),
    ],
)
def test_explicit_layouts_that_cannot_work_name_one_that_does(layers, num_stages, message):
    with pytest.raises(ConfigError) as error:
        place_explicitly(62, layers, num_stages=num_stages)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "place",
    [
        place_evenly,
        lambda n, s: place_by_cost(n, StageMap.loop(s), costs=LayerCosts(embedding=0, layer=1, head=1)),
    ],
)
def test_more_stages_than_slots_are_refused(place):
    assert place(2, 4).layers_per_stage == (0, 1, 1, 0)
    with pytest.raises(ConfigError, match="5 stages for 2 layers"):
        place(2, 5)
    with pytest.raises(ConfigError, match="0 layers in 2 stages"):
        place(0, 2)


def test_no_stages_are_refused():
    with pytest.raises(ConfigError, match="2 layers in 0 stages"):
        place_evenly(2, 0)


def test_costs_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="must be above 0"):
        LayerCosts(embedding=0, layer=0, head=1)
    with pytest.raises(ConfigError, match="at least 0"):
        LayerCosts(embedding=-1, layer=1, head=1)
