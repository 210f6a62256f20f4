"""Published benchmarks: how each asks, where answers are cut, what counts as right, and what others have scored.

`base` says what a benchmark is; each has a module of its own; `catalogue` lists them. `completions` collects answers
from a model, a server or a file, `scoring` runs or compares them and keeps a folder that can be resumed, `published`
has published scores to compare with. Data is the user's own file, whose fields are checked before anything is asked.
"""
