"""Ranks and what they say to each other: collectives, tensor-parallel layers, data parallelism with sharded state."""
