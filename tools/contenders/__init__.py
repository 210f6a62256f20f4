"""The contenders of `bench_parallel.py`, one module each with `build(job)`; see `bench_ranks`."""
