"""Ranks and their communication: collectives, tensor-parallel layers, data parallelism with sharded optimizer state."""
