"""Weights on disk: training checkpoints and Hugging Face folders."""
