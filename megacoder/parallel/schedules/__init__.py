"""Pipeline schedules as data: build a list, prove it, simulate it, turn it into a program, draw it.

    schedule = build_schedule("zbv", num_ranks=4, num_microbatches=16)  # generators
    check_schedule(schedule)  # validate
    program = build_program(schedule)  # program; what a runner executes

Read in this order: `schedule` (the types and the two dependency rules), `generators`, `validate`, `simulate`,
`program`; beside them `placement` (layers to stages), `waiting` (which weight gradients are postponed) and `draw` with
its `picture`. Nothing here imports torch.
"""
