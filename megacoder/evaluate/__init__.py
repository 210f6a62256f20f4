"""What a trained model can do: bits per byte, infilling, and the baselines beside them."""
