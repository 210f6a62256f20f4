"""`megacoder plan`: what a run would need and take, before any GPU is taken.

With `--model` every layout of a model on a cluster; with `--tokens` the scaling law's batch and learning rate too;
with neither one pipeline schedule, simulated.
"""

from collections.abc import Sequence

from megacoder.cli import plan_cluster, plan_schedule

__all__ = ["main"]

_OF_A_CLUSTER = ("--model", "--tokens", "--device", "--devices")


def main(argv: Sequence[str]) -> None:
    """Runs the one that the options ask for."""
    words = [word.partition("=")[0] for word in argv]
    if "-h" in words or "--help" in words:
        plan_schedule.print_help()
        plan_cluster.main(argv)
    elif any(option in words for option in _OF_A_CLUSTER):
        plan_cluster.main(argv)
    else:
        plan_schedule.main(argv)
