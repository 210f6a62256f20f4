"""What a trained model can do: bits per byte and infilling, beside simple baselines, and published benchmarks."""
