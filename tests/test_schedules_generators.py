"""Every schedule is valid for any number of ranks and microbatches and holds as many activations as its paper says."""

import pytest

from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.validate import check_schedule, live_activations, peak_live


def build(name, num_ranks, num_microbatches, num_chunks=None):
    return build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)


def written(schedule):
    return [" ".join(map(str, actions)) for actions in schedule.ranks]


def test_two_ranks_by_hand():
    assert written(build("gpipe", 2, 2)) == ["F0.0 F1.0 B0.0 B1.0"] * 2
    assert written(build("1f1b", 2, 3)) == ["F0.0 F1.0 B0.0 F2.0 B1.0 B2.0", "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0"]
    assert written(build("zb-h1", 2, 2)) == ["F0.0 F1.0 I0.0 W0.0 I1.0 W1.0", "F0.0 I0.0 F1.0 I1.0 W0.0 W1.0"]
    assert written(build("interleaved", 2, 2)) == [
        "F0.0 F1.0 F0.1 F1.1 B0.1 B1.1 B0.0 B1.0",
        "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_any_number_of_microbatches_is_valid(name, num_ranks):
    for num_microbatches in range(1, 3 * num_ranks + 2):
        for num_chunks in (2, 3, 5) if name == "interleaved" else (None,):
            schedule = build(name, num_ranks, num_microbatches, num_chunks)
            check_schedule(schedule)
            per_rank = num_microbatches * schedule.num_chunks
            assert all(sum(action.op == "F" for action in actions) == per_rank for actions in schedule.ranks)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (4, 2), (4, 7), (4, 8), (8, 24)])
def test_peak_activations_are_the_published_ones(num_ranks, num_microbatches):
    p, m = num_ranks, num_microbatches

    def peaks(name, num_chunks=None):
        return [peak_live(actions) for actions in build(name, p, m, num_chunks).ranks]

    assert peaks("gpipe") == [m] * p
    assert peaks("1f1b") == [min(p - rank, m) for rank in range(p)]
    assert peaks("zb-h1") == [min(p, m)] * p
    assert max(peaks("zbv")) <= 2 * min(p, m)
    assert max(peaks("dualpipev")) <= 2 * p + 1
    if m % p == 0:
        assert peaks("zbv") == [2 * p] * p or m < 2 * p
        assert peaks("dualpipev") == [2 * p + 1] * p or m < 2 * p + 1
        for v in (2, 3):
            expected = [min(2 * (p - 1 - rank) + (v - 1) * p + 1, v * m) for rank in range(p)]
            assert peaks("interleaved", v) == expected


def test_zb_h1_delays_weight_gradients_by_the_rank():
    waiting = [max(live.waiting for live in live_activations(actions)) for actions in build("zb-h1", 4, 12).ranks]
    assert waiting == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "1f1"}, "unknown schedule '1f1' (did you mean '1f1b'?)"),
        ({"num_ranks": 0}, "schedule '1f1b' with 0 pipeline ranks"),
        ({"num_microbatches": -1}, "schedule '1f1b' with -1 microbatches"),
        ({"num_chunks": 2}, "schedule '1f1b' with 2 chunks: it has 1"),
        ({"name": "zbv", "num_chunks": 3}, "schedule 'zbv' with 3 chunks: it has 2"),
        ({"name": "interleaved", "num_chunks": 1}, "with 1 chunks: needs at least 2; with 1 it is '1f1b'"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        build_schedule(**{"name": "1f1b", "num_ranks": 2, "num_microbatches": 4, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
