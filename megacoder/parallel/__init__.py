"""Ranks and what they say to each other: collectives, data parallelism with sharded optimizer state."""
