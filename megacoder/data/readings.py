"""How much of each dataset a run reads: arithmetic, from the order in a stream's state (see `TokenStream.state_dict`).

Times are tokens in windows over tokens of the dataset: what BOS, fill-in-the-middle and padding add is not taken off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megacoder.data.blend import blend_counts, blend_table

__all__ = ["MANY_TIMES", "Reading", "describe_readings", "readings"]

MANY_TIMES = 4.0
"""Up to which reading again is almost as good as new data (Muennighoff et al. 2023, arXiv:2305.16264)."""
_EACH_SHOWN = 4  # datasets that are listed one by one


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Of one dataset."""

    tokens: int
    """that it has"""
    windows: int
    """drawn from it"""
    share: float
    """of all windows"""
    times: float
    """that each of its tokens is read"""


def readings(order: dict[str, Any], *, seq_length: int, num_windows: int, first_window: int = 0) -> list[Reading]:
    """What `num_windows` windows from `first_window` on read; none where the order does not tell, as of conversations,
    or of several datasets in Megatron's order."""
    sizes = [tokens for _, tokens in order.get("datasets", [])]
    counts = [num_windows]
    if len(sizes) != 1:
        if "num_streams" not in order:
            return []
        table, streams = blend_table(order["weights"]), order["num_streams"]
        before, after = (
            blend_counts(table, num_windows=windows, num_streams=streams, num_datasets=len(sizes))
            for windows in (first_window, first_window + num_windows)
        )
        counts = [stop - start for start, stop in zip(before, after, strict=True)]
    return [
        Reading(tokens=size, windows=count, share=count / max(1, num_windows), times=count * seq_length / size)
        for size, count in zip(sizes, counts, strict=True)
    ]


def describe_readings(names: Sequence[str], reads: Sequence[Reading]) -> list[str]:
    """Lines for people: one that says it of all datasets, and one that names those read many times over."""
    if not reads:
        return []
    pairs = sorted(zip(names, reads, strict=True), key=lambda pair: pair[1].times)
    if len(reads) == 1:
        lines = [f"{names[0]}: {reads[0].tokens:,} tokens, each read {_shown(reads[0])}"]
    elif len(reads) <= _EACH_SHOWN:
        lines = ["; ".join(
            f"{name}: {read.tokens:,} tokens, {read.share:.1%} of the run, {_shown(read)}"
            for name, read in zip(names, reads, strict=True)
        )]  # fmt: skip
    else:
        total = sum(read.tokens for read in reads)
        ends = " to ".join(f"{_shown(read)} ({name})" for name, read in (pairs[0], pairs[-1]))
        lines = [f"{len(reads)} datasets, {total:,} tokens, read {ends}"]
    many = [f"{name} {_shown(read)}" for name, read in reversed(pairs) if read.times > MANY_TIMES]
    if many:
        more = f" and {len(many) - _EACH_SHOWN} more" if len(many) > _EACH_SHOWN else ""
        lines.append(
            f"read many times over: {', '.join(many[:_EACH_SHOWN])}{more}; beyond about {MANY_TIMES:g} times the same "
            "data teach ever less (arXiv:2305.16264): lower their weight, or add data"
        )
    return lines


def _shown(read: Reading) -> str:
    return f"{read.times:,.1f} times" if read.times >= 0.1 else f"{read.times:.1g} times"
