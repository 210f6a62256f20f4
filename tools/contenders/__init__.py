"""The contenders of `bench_parallel.py` and `bench_train.py`, modules with `build(job)`; see `bench_ranks`."""
