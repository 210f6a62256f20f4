"""One module per op: a plain reference in torch, and a forward and a backward half that pick the fastest backend.

`reference` functions are ordinary differentiable torch; every backend is tested against them in fp64. The halves
(`*_forward`, `*_backward`) are what the hand-scheduled block calls: they say what is saved and where gradients go.
"""
