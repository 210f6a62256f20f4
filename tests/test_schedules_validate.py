"""The validator accepts exactly the lists that can run, and says what is wrong with the others."""

import random
from collections import Counter, deque
from dataclasses import replace

import pytest

from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.schedule import Action, Schedule, ScheduleError, StageMap
from megacoder.parallel.schedules.validate import check_schedule, execution_order, live_activations, peak_live


def parse(text):
    """`F0.0 B0.0` as actions."""
    return tuple(
        Action(word[0], *(int(number) for number in word[1:].split("."))) for word in text.split()
    )  # fmt: skip


def schedule_of(stage_map, num_microbatches, *ranks):
    return Schedule(name="hand", num_microbatches=num_microbatches, stage_map=stage_map, ranks=tuple(map(parse, ranks)))


def edited(schedule, rank, actions):
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(actions)
    return replace(schedule, ranks=tuple(ranks))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (["F0.0 B0.0"], "hand: 1 lists of actions for 2 pipeline ranks"),
        (["F0.0 B0.0", "F0.0 B0.0 F1.0 B1.0"], "rank 1, action 2, F1.0: outside 1 microbatches and 1 chunks"),
        (["F0.1 B0.1", "F0.0 B0.0"], "rank 0, action 0, F0.1: outside 1 microbatches and 1 chunks"),
        (["F0.0 F0.0 B0.0", "F0.0 B0.0"], "rank 0, action 1, F0.0: this forward has been run already"),
        (["B0.0 F0.0", "F0.0 B0.0"], "rank 0, action 0, B0.0: comes before its forward"),
        (["F0.0 B0.0 B0.0", "F0.0 B0.0"], "rank 0, action 2, B0.0: this backward has been run already"),
        (["F0.0 B0.0 W0.0", "F0.0 B0.0"], "rank 0, action 2, W0.0: this backward has been run already"),
        (["F0.0 W0.0 I0.0", "F0.0 B0.0"], "rank 0, action 1, W0.0: comes before its I"),
        (["F0.0 I0.0", "F0.0 B0.0"], "rank 0 never runs W of microbatch 0, chunk 0"),
        (["F0.0", "F0.0 B0.0"], "rank 0 never runs B, or I and W of microbatch 0, chunk 0"),
        (["", "F0.0 B0.0"], "rank 0 never runs F of microbatch 0, chunk 0"),
    ],
)
def test_a_broken_list_is_named(ranks, message):
    with pytest.raises(ScheduleError) as error:
        check_schedule(schedule_of(StageMap.loop(2), 1, *ranks))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_b_and_split_backwards_mix_freely():
    check_schedule(schedule_of(StageMap.loop(2), 2, "F0.0 F1.0 I0.0 B1.0 W0.0", "F0.0 B0.0 F1.0 I1.0 W1.0"))


def test_a_deadlock_names_every_blocked_rank():
    crossed = schedule_of(StageMap.loop(2), 2, "F0.0 B0.0 F1.0 B1.0", "F1.0 B1.0 F0.0 B0.0")
    with pytest.raises(ScheduleError) as error:
        check_schedule(crossed)
    assert str(error.value) == (
        "hand: deadlock: rank 0 at B0.0 waits for the gradient of microbatch 0 into stage 0; "
        "rank 1 at F1.0 waits for the activation of microbatch 1 into stage 1"
    )


def test_a_wide_deadlock_stays_readable():
    ranks = ["F0.0 B0.0 F1.0 B1.0"] * 5 + ["F1.0 B1.0 F0.0 B0.0"]
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 at B0\.0 .*; rank 3 at B0\.0 [^;]*; and 2 more$"):
        check_schedule(schedule_of(StageMap.loop(6), 2, *ranks))


@pytest.mark.parametrize("stages", [((0, 1), (2,)), ((0,), (0,)), ((1,), (2,)), ((),), ()])
def test_a_stage_map_holds_each_stage_once(stages):
    with pytest.raises(ScheduleError, match="exactly once"):
        StageMap(stages)


def test_stage_maps():
    assert StageMap.loop(3, 2).stages == ((0, 3), (1, 4), (2, 5))
    assert StageMap.vee(3).stages == ((0, 5), (1, 4), (2, 3))
    assert StageMap.vee(2).home == ((0, 0), (1, 0), (1, 1), (0, 1))


def can_run(schedule):
    """The definition, by brute force: right counts, and a graph of all orders and dependencies without a cycle."""
    stages, last = schedule.stage_map.stages, schedule.stage_map.num_stages - 1
    nodes = {}
    for rank, actions in enumerate(schedule.ranks):
        for index, (op, microbatch, chunk) in enumerate(actions):
            nodes.setdefault((op, microbatch, stages[rank][chunk]), []).append((rank, index))
    counts = Counter({key: len(places) for key, places in nodes.items()})
    for stage in range(last + 1):
        for mb in range(schedule.num_microbatches):
            found = tuple(counts.pop((op, mb, stage), 0) for op in "FBIW")
            if found not in ((1, 1, 0, 0), (1, 0, 1, 1)):
                return False
    if counts:
        return False

    def gradient(mb, stage):
        return nodes.get(("B", mb, stage)) or nodes[("I", mb, stage)]

    edges = {place: [] for places in nodes.values() for place in places}
    for rank, actions in enumerate(schedule.ranks):
        for index in range(1, len(actions)):
            edges[rank, index - 1].append((rank, index))
    for (op, mb, stage), [place] in nodes.items():
        before = []
        if op == "F" and stage > 0:
            before += nodes["F", mb, stage - 1]
        if op in "BI":
            before += nodes["F", mb, stage] + (gradient(mb, stage + 1) if stage < last else [])
        if op == "W":
            before += nodes["I", mb, stage]
        for source in before:
            edges[source].append(place)
    incoming = Counter(target for targets in edges.values() for target in targets)
    ready = deque(place for place in edges if not incoming[place])
    seen = 0
    while ready:
        seen += 1
        for target in edges[ready.popleft()]:
            incoming[target] -= 1
            if not incoming[target]:
                ready.append(target)
    return seen == len(edges)


def accepted(schedule):
    try:
        check_schedule(schedule)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 3), (3, 4), (4, 9)])
def test_fuzzed_lists_are_rejected_or_proved_valid(name, num_ranks, num_microbatches):
    valid = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    assert can_run(valid)
    generator = random.Random(f"{name} {num_ranks}")
    verdicts = Counter()
    for _ in range(60):
        rank = generator.randrange(num_ranks)
        actions = list(valid.ranks[rank])
        i, j = generator.sample(range(len(actions)), 2)
        kind = generator.choice(["swap", "swap neighbours", "drop", "duplicate", "change"])
        if kind == "swap":
            actions[i], actions[j] = actions[j], actions[i]
        elif kind == "swap neighbours":
            i = min(i, len(actions) - 2)
            actions[i], actions[i + 1] = actions[i + 1], actions[i]
        elif kind == "drop":
            del actions[i]
        elif kind == "duplicate":
            actions.insert(j, actions[i])
        else:
            actions[i] = actions[i]._replace(op=generator.choice("FBIW"))
        broken = edited(valid, rank, actions)
        assert accepted(broken) == can_run(broken), (kind, rank, i, j)
        if kind in ("drop", "duplicate"):
            assert not accepted(broken)
        verdicts[accepted(broken)] += 1
    assert verdicts[False] > 20


def test_the_execution_order_respects_every_dependency():
    schedule = build_schedule("dualpipev", num_ranks=3, num_microbatches=7)
    made = set()
    steps = list(execution_order(schedule))
    for step in steps:
        assert step.consumed is None or step.consumed in made
        made.add(step.produced)
    for rank, actions in enumerate(schedule.ranks):
        assert [step.action for step in steps if step.rank == rank] == list(actions)


def test_live_activations_by_hand():
    actions = parse("F0.0 F1.0 I0.0 F2.0 W0.0 B1.0 I2.0 W2.0")
    assert list(live_activations(actions)) == [
        (1, 0), (2, 0), (2, 0), (2, 1), (2, 1), (2, 0), (1, 0), (0, 1)
    ]  # fmt: skip
    assert peak_live(actions) == 3
    assert peak_live(actions, waiting_share=0.25) == 2.25
    assert peak_live(()) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [("gpipe", 1024), ("1f1b", 64), ("interleaved", 191), ("zb-h1", 64), ("zbv", 128), ("dualpipev", 129)],
)
def test_64_ranks_with_1024_microbatches(name, peak):
    schedule = build_schedule(name, num_ranks=64, num_microbatches=1024)
    check_schedule(schedule)
    assert peak_live(schedule.ranks[0]) == peak


def test_one_wrong_place_among_64_ranks_with_1024_microbatches_is_found():
    schedule = build_schedule("1f1b", num_ranks=64, num_microbatches=1024)
    last = list(schedule.ranks[63])
    last[100], last[102] = last[102], last[100]  # two forwards in the wrong order, each before its backward no more
    with pytest.raises(ScheduleError, match="rank 63, action 101"):
        check_schedule(edited(schedule, 63, last))
