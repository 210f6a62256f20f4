"""The parts that `bench_data.py` measures, one module each."""
