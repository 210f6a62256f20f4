"""`megacoder plan`: what memory and time a run would need, before any GPU is used."""

from collections.abc import Sequence

from megacoder.cli import plan_cluster, plan_schedule
from megacoder.core.console import say

__all__ = ["main"]

_CHOICE = """\
megacoder plan --model NAME or RUN.toml   every layout of a model on a cluster
megacoder plan --tokens N                 the scaling law's batch and learning rate; also goes with --model
megacoder plan                            one pipeline schedule, simulated
"""
_OF_A_CLUSTER = ("--model", "--tokens", "--device", "--devices")


def main(argv: Sequence[str]) -> None:
    """Runs the one that the options ask for."""
    words = [word.partition("=")[0] for word in argv]
    if not argv:
        say(f"{_CHOICE}Without options, the last of these with its defaults:")
    if "-h" in words or "--help" in words:
        print(_CHOICE)
        plan_schedule.print_help()
        plan_cluster.main(argv)
    elif any(option in words for option in _OF_A_CLUSTER):
        plan_cluster.main(argv)
    else:
        plan_schedule.main(argv)
