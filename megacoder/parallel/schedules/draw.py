"""The picture of a schedule: ranks as rows, time to the right, a box per action with its microbatch number."""

from pathlib import Path

from megacoder.parallel.schedules.picture import TEXT_HEIGHT, Box, Picture, Text, text_width
from megacoder.parallel.schedules.schedule import Op
from megacoder.parallel.schedules.simulate import Timeline
from megacoder.parallel.schedules.validate import peak_live

__all__ = ["draw", "picture_of"]

_COLOURS: dict[Op, tuple[int, int, int]] = {
    "F": (130, 177, 226),
    "B": (244, 166, 102),
    "I": (249, 205, 128),
    "W": (146, 201, 143),
}
_MEANING: dict[Op, str] = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
_IDLE = (240, 240, 240)
_MARGIN, _SPACE, _ROW, _GAP = 20, 14, 30, 4  # pixels
_MAX_WIDTH = 12_000  # pixels of time; beyond that boxes get thinner and lose their numbers


def draw(timeline: Timeline, path: Path) -> None:
    """Writes the timeline as `path` (.svg or .png)."""
    picture_of(timeline).write(path)


def picture_of(timeline: Timeline) -> Picture:
    """The timeline drawn; later chunks of a rank in darker shades."""
    schedule = timeline.schedule
    title, label = _title(timeline), f"rank {schedule.num_ranks - 1}"
    left = _MARGIN + text_width(label) + _SPACE
    top = _MARGIN + TEXT_HEIGHT + _SPACE
    bottom = top + schedule.num_ranks * (_ROW + _GAP)
    scale = _scale(timeline)
    picture = Picture(width=0, height=bottom + _SPACE + TEXT_HEIGHT + _MARGIN)
    picture.texts.append(Text(x=_MARGIN, y=_MARGIN, text=title))
    for rank in range(schedule.num_ranks):
        _draw_rank(picture, timeline, rank, left=left, y=top + rank * (_ROW + _GAP), scale=scale)
    legend_right = _draw_legend(picture, timeline, y=bottom + _SPACE)
    right = max(left + timeline.makespan * scale, _MARGIN + text_width(title), legend_right)
    picture.width = round(right) + _MARGIN
    return picture


def _scale(timeline: Timeline) -> float:
    """Pixels per unit of time: the shortest action has room for its number, unless the whole gets too wide."""
    widest_number = text_width(str(timeline.schedule.num_microbatches - 1))
    shortest = min(
        end - start
        for starts, ends in zip(timeline.start, timeline.end, strict=True)
        for start, end in zip(starts, ends, strict=True)
    )
    return min((widest_number + 10) / shortest, _MAX_WIDTH / timeline.makespan)


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    idle = sum(timeline.idle(rank) for rank in range(schedule.num_ranks)) / schedule.num_ranks / timeline.makespan
    peak = max(map(peak_live, schedule.ranks)) / schedule.num_chunks
    return (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches, "
        f"idle {idle:.1%}, peak activations of {peak:g} microbatches"
    )


def _draw_rank(picture: Picture, timeline: Timeline, rank: int, *, left: float, y: int, scale: float) -> None:
    schedule = timeline.schedule
    text_y = y + (_ROW - TEXT_HEIGHT) / 2
    picture.texts.append(Text(x=left - _SPACE, y=text_y, text=f"rank {rank}", anchor="end"))
    picture.boxes.append(Box(x=left, y=y, width=timeline.makespan * scale, height=_ROW, color=_IDLE))
    for action, start, end in zip(schedule.ranks[rank], timeline.start[rank], timeline.end[rank], strict=True):
        width = (end - start) * scale
        border = 1 if width > 4 else 0
        color = _shade(action.op, action.chunk, schedule.num_chunks)
        picture.boxes.append(Box(x=left + start * scale, y=y, width=width - border, height=_ROW, color=color))
        if text_width(str(action.microbatch)) + 4 <= width:
            x = left + (start + end) / 2 * scale
            picture.texts.append(Text(x=x, y=text_y, text=str(action.microbatch), anchor="middle"))


def _draw_legend(picture: Picture, timeline: Timeline, *, y: int) -> int:
    """Swatches of every chunk and the meaning of each letter in use; returns where the last text ends."""
    num_chunks = timeline.schedule.num_chunks
    used = {action.op for actions in timeline.schedule.ranks for action in actions}
    x = end = _MARGIN
    for op, meaning in _MEANING.items():
        if op not in used:
            continue
        for chunk in range(num_chunks):
            color = _shade(op, chunk, num_chunks)
            picture.boxes.append(Box(x=x, y=y, width=TEXT_HEIGHT, height=TEXT_HEIGHT, color=color))
            x += TEXT_HEIGHT
        text = f"{op} {meaning}"
        picture.texts.append(Text(x=x + 8, y=y, text=text))
        end = x + 8 + text_width(text)
        x = end + 2 * _SPACE
    return end


def _shade(op: Op, chunk: int, num_chunks: int) -> tuple[int, int, int]:
    """Chunk 0 in the color itself, the last at three quarters of its brightness."""
    share = 1 - 0.25 * chunk / max(num_chunks - 1, 1)
    red, green, blue = _COLOURS[op]
    return round(red * share), round(green * share), round(blue * share)
