"""What a run will need and take on a cluster that is not here: memory by kind, time of a step, and the best layouts.

    devices    what a device can do, by its data sheet, and which share of that programs reach
    memory     bytes of a rank by kind
    work       time of a layer, the head and the exchanges
    pipelines  schedules simulated at a few microbatches and carried on
    step_time  where those meet: the time of a step
    search     every layout, the best first, and why the others fall out
    scaling    batch and learning rate for a budget of tokens

Pure arithmetic on the configs that a run has: nothing here starts a process or allocates a tensor.
"""
