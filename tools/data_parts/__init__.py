"""What `bench_data.py` measures, a module each."""
