"""The schedules themselves: each is a short table of phases, (what to repeat, how often), for a rank r of p.

A phase is written in tokens: `F0` is the next forward of chunk 0, `B1` or `I1` the next backward of chunk 1, and `W`
the weight gradient that has waited longest. Microbatches of a chunk always go in order, so the counting is done once,
in `_number`, and the tables stay as readable as the figures of the papers.

Any number of microbatches works with every schedule. Tables that need a minimum (or a multiple) are written for the
next larger count and the surplus microbatches are struck out: microbatches depend on each other only through the
order of the lists, so what is left of a valid schedule is valid, and holds no more activations than before.

Costs in the docstrings: tF, tI, tW are the times of one chunk, tB = tI + tW, and *idle* is how long every rank waits in
a step that all ranks end together. Memory is counted in chunks whose activations are live (1/v of a rank's layers).
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from megacoder.core.config import did_you_mean
from megacoder.core.errors import ConfigError
from megacoder.parallel.schedules.schedule import Action, Schedule, StageMap

__all__ = [
    "SCHEDULES",
    "ScheduleKind",
    "build_schedule",
    "dualpipev",
    "gpipe",
    "interleaved",
    "one_f_one_b",
    "zb_h1",
    "zbv",
]


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv:1811.06965).

    Idle (p-1)(tF+tB), the fraction (p-1)/m of the work. Holds all m microbatches.
    """
    m = num_microbatches
    return _schedule("gpipe", StageMap.loop(num_ranks), m, lambda _: _repeat(("F0", m), ("B0", m)))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B, PipeDream-flush (Narayanan et al., arXiv:2006.09503 and arXiv:2104.04473).

    Idle (p-1)(tF+tB) as GPipe, but rank r holds only min(p-r, m) microbatches.
    """
    p, n = num_ranks, max(num_microbatches, num_ranks)

    def tokens(r: int) -> list[str]:
        return _repeat(("F0", p - 1 - r), ("F0 B0", n - p + 1 + r), ("B0", p - 1 - r))

    return _schedule("1f1b", StageMap.loop(p), num_microbatches, tokens)


def interleaved(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: v chunks per rank, visited with p microbatches each (Narayanan et al., arXiv:2104.04473, 2.2).

    Idle (p-1)(tF+tB) with tF and tB of a chunk, the fraction (p-1)/(v m) of the work. Rank r holds 2(p-1-r) +
    (v-1)p + 1 chunks, rank 0 thus 1 + (p-1)/(p v) times what 1F1B holds. Where the paper requires m to be a multiple of
    p, here the visits have as equal numbers of microbatches as possible, never fewer than p, the larger visits first:
    the idle time stays the published one for every m >= p, at v - 1 chunks of memory per microbatch beyond p.
    """
    p, v, n = num_ranks, num_chunks, max(num_microbatches, num_ranks)
    base, extra = divmod(n, n // p)
    visits = [base + (visit < extra) for visit in range(n // p)]
    forwards = [f"F{chunk}" for size in visits for chunk in range(v) for _ in range(size)]
    backwards = [f"B{chunk}" for size in visits for chunk in reversed(range(v)) for _ in range(size)]

    def tokens(r: int) -> list[str]:
        warmup = min(2 * (p - 1 - r) + (v - 1) * visits[0], len(forwards))
        steady = [token for pair in zip(forwards[warmup:], backwards, strict=False) for token in pair]
        return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]

    return _schedule("interleaved", StageMap.loop(p, v), num_microbatches, tokens)


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B with backward split and rank r's weight gradients r microbatches late (arXiv:2401.10241, 2.1).

    Idle (p-1)(tF+tI-tW), a third of 1F1B's when the three are equal. Every rank holds min(p, m) microbatches, of
    which up to r + 1 wait for W alone.
    """
    p, n = num_ranks, max(num_microbatches, num_ranks)

    def tokens(r: int) -> list[str]:
        return _repeat(("F0", p - 1 - r), ("F0 I0", r), ("F0 I0 W", n - p + 1), ("I0 W", p - 1 - r), ("W", r))

    return _schedule("zb-h1", StageMap.loop(p), num_microbatches, tokens)


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V: two chunks per rank in a V, no bubble with the memory of 1F1B (arXiv:2401.10241, section 6).

    With tF = tI = tW no rank waits between its first and its last action; ranks start one tF apart and end likewise,
    so that a step whose end they share idles (p-1)tF. No rank holds more than min(2p, 2m) chunks, which is what the
    first rank of 1F1B holds.
    """
    p, n = num_ranks, max(num_microbatches, 2 * num_ranks - 1)

    def tokens(r: int) -> list[str]:
        return _repeat(
            ("F0", 2 * (p - r) - 1), ("F1 F0", r), ("F1 I1 W", p - r),  # warm-up
            ("F0 I0 W F1 I1 W", n - 2 * p + 1 + r), ("I0 W F1 I1 W", p - 1 - r),  # steady
            ("I0 I1", r), ("I0 W", p - r), ("W", 2 * r),  # cool-down
        )  # fmt: skip

    return _schedule("zbv", StageMap.vee(p), num_microbatches, tokens)


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV: DualPipe cut in half, a forward beside every backward (DeepSeek-V3, arXiv:2412.19437, 3.2.1).

    Phases and figures are those of github.com/deepseek-ai/DualPipe: idle (PP/2 - 1)(F&B + tB - 3tW) with PP = 2p
    stages, where a pair F&B delivers nothing before both are done. A runner that delivers the forward when it is done,
    as the simulator does, idles only (p-1)tF; both hold for tF = tI = tW. Holds at most 2p + 1 chunks.
    """
    p, n = num_ranks, max(num_microbatches, 2 * num_ranks)

    def tokens(r: int) -> list[str]:
        # the backwards of the tail, chunks alternating; the second half of them postpones its weight gradients
        tail = [f"{'B' if k <= r else 'I'}{1 - k % 2}" for k in range(2 * r + 2)]
        return (
            _repeat(("F0", 2 * (p - 1 - r)), ("F0 F1", r + 1), ("I1 W F1", p - 1 - r))
            + _repeat(("F0 B1 F1 B0", n - 2 * p + r + 1), ("B1 F1 B0", p - 1 - r))
            + tail
            + _repeat(("W I0", p - 1 - r), ("W", r + 1))
        )

    return _schedule("dualpipev", StageMap.vee(p), num_microbatches, tokens)


class ScheduleKind(NamedTuple):
    """A schedule for any number of ranks and microbatches."""

    build: Callable[..., Schedule]
    num_chunks: int | None
    """of every rank; None: a choice"""
    postpones: bool
    """whether weight gradients wait"""


SCHEDULES = {
    "gpipe": ScheduleKind(gpipe, num_chunks=1, postpones=False),
    "1f1b": ScheduleKind(one_f_one_b, num_chunks=1, postpones=False),
    "interleaved": ScheduleKind(interleaved, num_chunks=None, postpones=False),
    "zb-h1": ScheduleKind(zb_h1, num_chunks=1, postpones=True),
    "zbv": ScheduleKind(zbv, num_chunks=2, postpones=True),
    "dualpipev": ScheduleKind(dualpipev, num_chunks=2, postpones=True),
}
"""Every schedule by the name that users write."""


def build_schedule(name: str, *, num_ranks: int, num_microbatches: int, num_chunks: int | None = None) -> Schedule:
    """The schedule called `name`; ConfigError says which argument cannot work.

    `num_chunks` can be chosen for `interleaved` only (2 unless given); others accept only the number that they fix.
    """
    if name not in SCHEDULES:
        hint = did_you_mean(name, SCHEDULES)
        raise ConfigError(f"unknown schedule {name!r}{hint}; known: {', '.join(SCHEDULES)}")
    for what, value in (("pipeline ranks", num_ranks), ("microbatches", num_microbatches)):
        if value < 1:
            raise ConfigError(f"schedule {name!r} with {value} {what}: needs at least 1")
    kind = SCHEDULES[name]
    if kind.num_chunks is None:
        chunks = 2 if num_chunks is None else num_chunks
        if chunks < 2:
            raise ConfigError(f"schedule {name!r} with {chunks} chunks: needs at least 2; with 1 it is '1f1b'")
        return kind.build(num_ranks, num_microbatches, chunks)
    if num_chunks not in (None, kind.num_chunks):
        raise ConfigError(
            f"schedule {name!r} with {num_chunks} chunks: it has {kind.num_chunks}; 'interleaved' takes any number"
        )
    return kind.build(num_ranks, num_microbatches)


def _repeat(*phases: tuple[str, int]) -> list[str]:
    """The tokens of (pattern, times) phases, written out."""
    return [token for pattern, times in phases for _ in range(times) for token in pattern.split()]


def _schedule(name: str, stage_map: StageMap, num_microbatches: int, tokens: Callable[[int], list[str]]) -> Schedule:
    ranks = tuple(
        tuple(action for action in _number(tokens(rank)) if action.microbatch < num_microbatches)
        for rank in range(stage_map.num_ranks)
    )
    return Schedule(name=name, num_microbatches=num_microbatches, stage_map=stage_map, ranks=ranks)


def _number(tokens: Iterable[str]) -> list[Action]:
    """Gives every token its microbatch: the next of its chunk and direction, for W the oldest I that waits."""
    next_microbatch: dict[tuple[bool, int], int] = {}
    waiting: deque[Action] = deque()
    actions = []
    for token in tokens:
        if token == "W":
            action = waiting.popleft()._replace(op="W")
        else:
            op, chunk = token[0], int(token[1:])
            direction = (op == "F", chunk)
            microbatch = next_microbatch.get(direction, 0)
            next_microbatch[direction] = microbatch + 1
            action = Action(op, microbatch, chunk)  # type: ignore[arg-type]
            if op == "I":
                waiting.append(action)
        actions.append(action)
    return actions
