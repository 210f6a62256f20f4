"""What a run needs on a cluster that is not here: memory by kind, the time of a step, and the best layouts.

    devices    what a device can do by its data sheet, and which share of that programs reach
    memory     bytes of a rank by kind
    work       time of a layer, the head and the exchanges
    pipelines  schedules simulated at a few microbatches and extrapolated
    step_time  all of these together: the time of a step
    search     every layout, the best first, and why the others are rejected
    scaling    batch and learning rate for a budget of tokens

Pure arithmetic on the configs that a run has: nothing here starts a process or allocates a tensor.
"""
