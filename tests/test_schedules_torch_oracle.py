"""The lists are in the order of torch.distributed.pipelining, wherever both support the sizes."""

from types import SimpleNamespace

import pytest

from megacoder.parallel.schedules.generators import build_schedule

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torch_list(name, rank, num_ranks, num_microbatches, num_chunks):
    """One rank's (op, microbatch, stage) from torch; its lists depend on sizes alone, so no process group is needed."""
    cls = getattr(schedules, CLASSES[name])
    sizes = SimpleNamespace(
        pp_group_size=num_ranks,
        num_stages=num_ranks * num_chunks,
        _num_stages=num_ranks * num_chunks,
        _n_microbatches=num_microbatches,
        n_local_stages=num_chunks,
        microbatches_per_round=num_microbatches // max(1, num_microbatches // num_ranks),
    )
    if hasattr(cls, "_calculate_single_rank_operations"):
        actions = cls._calculate_single_rank_operations(sizes, rank)
    else:
        actions = cls._get_pipeline_order(sizes)[rank]
    flat = [part for action in actions if action is not None for part in (action.sub_actions or [action])]
    named = [(LETTERS.get(part.computation_type.name), part.microbatch_index, part.stage_index) for part in flat]
    return [item for item in named if item[0] is not None]  # torch also lists its gradient reductions


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 4), (4, 8), (4, 10), (4, 12), (5, 10)])
@pytest.mark.parametrize("name", CLASSES)
def test_same_order_as_torch(name, num_ranks, num_microbatches):
    schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    for rank, actions in enumerate(schedule.ranks):
        if name == "1f1b" and rank == num_ranks - 1:
            continue  # torch 2.13 lists F1, F2, ... there and leaves out F0
        stages = schedule.stage_map.stages[rank]
        ours = [(action.op, action.microbatch, stages[action.chunk]) for action in actions]
        theirs = torch_list(name, rank, num_ranks, num_microbatches, schedule.num_chunks)
        assert sorted(ours) == sorted(theirs)
        # which of the waiting weight gradients goes first is free: ours is always the oldest
        assert [("W",) if item[0] == "W" else item for item in ours] == [
            ("W",) if item[0] == "W" else item for item in theirs
        ]
