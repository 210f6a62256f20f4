"""Pipeline schedules as data: build a list, prove it, simulate it, turn it into a program, draw it.

    schedule = build_schedule("zbv", num_ranks=4, num_microbatches=16)
    check_schedule(schedule)
    program = build_program(schedule)  # what a runner executes

Read in this order: `schedule` (the types and the two dependency rules), `generators`, `validate`, `simulate`,
`program`; beside them `placement` (layers to stages), `waiting` (which weight gradients are postponed) and `draw` with
its `picture`. Nothing here imports torch.
"""

from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.placement import (
    LayerCosts,
    Placement,
    place_by_cost,
    place_evenly,
    place_explicitly,
)
from megacoder.parallel.schedules.program import (
    Exchange,
    Instruction,
    Program,
    Recv,
    Send,
    build_program,
    check_program,
)
from megacoder.parallel.schedules.schedule import (
    Action,
    Op,
    Schedule,
    ScheduleError,
    StageMap,
    StageTensor,
    forwards_only,
)
from megacoder.parallel.schedules.simulate import Costs, Timeline, makespan, simulate
from megacoder.parallel.schedules.validate import Live, check_schedule, execution_order, live_activations, peak_live
from megacoder.parallel.schedules.waiting import limit_waiting

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Exchange",
    "Instruction",
    "LayerCosts",
    "Live",
    "Op",
    "Placement",
    "Program",
    "Recv",
    "Schedule",
    "ScheduleError",
    "Send",
    "StageMap",
    "StageTensor",
    "Timeline",
    "build_program",
    "build_schedule",
    "check_program",
    "check_schedule",
    "execution_order",
    "forwards_only",
    "limit_waiting",
    "live_activations",
    "makespan",
    "peak_live",
    "place_by_cost",
    "place_evenly",
    "place_explicitly",
    "simulate",
]
