"""A directed graph as an inline SVG, in layers from left to right.

Sugiyama's method in its plain form: every edge goes from an earlier layer to a later one, an edge across several
layers is routed through a slot in each, slots are ordered by the mean place of their neighbours and moved towards them.
Edges from one node share their slots until they branch off, so that a busy node draws one line and not ten.
Meant for some dozens of nodes; callers choose which. Ties are broken by index, so that a graph has only one drawing.
"""

from collections.abc import Container, Iterable, Sequence
from html import escape
from itertools import accumulate, pairwise

__all__ = ["layered_graph"]

_ROW, _LANE, _BETWEEN, _MARGIN = 28, 9, 64, 8  # pixels: a node's slot, a passing edge's, between layers, around
_BOX, _LETTER, _LONGEST = 22, 7, 30  # a box's height, a letter's width at most, letters of a label
_SWEEPS = 12

Pair = tuple[int, int]


def layered_graph(names: Sequence[str], edges: Iterable[Pair], *, describes: str) -> str:
    """Draws `names` as boxes and each edge (a, b) as a line from a on the left to b on the right.

    An edge against the order of the names (a after b: it closes a cycle) is drawn dashed; an edge of a node to itself
    not at all. There is at least one name. What is wider than the page scrolls.
    """
    forward: set[Pair] = set()
    closing: set[Pair] = set()
    for a, b in edges:
        if a != b:
            (forward if a < b else closing).add((min(a, b), max(a, b)))
    pairs = sorted(forward | closing)
    columns, routes = _routes(_levels(len(names), pairs), pairs, closing)
    _order(columns, routes)
    middle = _places(columns, routes, len(names))
    labels = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in names]
    left, right = _sides(columns, [len(label) * _LETTER + 16 for label in labels])
    width = max(right.values()) + _MARGIN
    height = max(middle.values()) + _ROW / 2 + _MARGIN
    size = f'viewBox="0 0 {width} {height:.0f}" style="width: {width}px; max-width: none"'
    parts = [f'<div class="scroll"><svg {size} role="img" aria-label="{escape(describes)}">']
    for pair, route in zip(pairs, routes, strict=True):
        look = 'stroke="var(--s1)" stroke-dasharray="5 3"' if pair in closing else f'stroke="var(--s{pair[0] % 3 * 2})"'
        arrow = "→" if pair not in closing else "↔" if pair in forward else "←"
        title = f"{names[pair[0]]} {arrow} {names[pair[1]]}"
        parts.append(
            f'<path d="{_curve(route, left, right, middle)}" fill="none" stroke-opacity=".6" {look}>'
            f"<title>{escape(title)}</title></path>"
        )
    for node, label in enumerate(labels):
        top, across = middle[node] - _BOX / 2, right[node] - left[node]
        parts.append(
            f'<g><title>{escape(names[node])}</title><rect x="{left[node]}" y="{top:.1f}" width="{across}" '
            f'height="{_BOX}" rx="5" fill="var(--panel)" stroke="var(--line)"/><text x="{left[node] + 8}" '
            f'y="{middle[node] + 4:.1f}" style="fill: var(--ink)">{escape(label)}</text></g>'
        )
    return "\n".join([*parts, "</svg></div>"])


def _levels(num_nodes: int, pairs: Sequence[Pair]) -> list[int]:
    """The layer of each node: after all its sources; nodes without a source are right before their first use."""
    levels = [0] * num_nodes
    for low, high in pairs:  # sorted: a node's own layer is settled before it is used
        levels[high] = max(levels[high], levels[low] + 1)
    for node in set(range(num_nodes)) - {high for _, high in pairs}:
        levels[node] = min((levels[high] - 1 for low, high in pairs if low == node), default=0)
    return levels


def _routes(
    levels: Sequence[int], pairs: Sequence[Pair], closing: Container[Pair]
) -> tuple[list[list[int]], list[list[int]]]:
    """The slots of each layer, and those that each pair's edge runs through, both ends included."""
    columns: list[list[int]] = [[] for _ in range(max(levels) + 1)]
    for node, level in enumerate(levels):
        columns[level].append(node)
    shared: dict[tuple[int, bool, int], int] = {}
    routes = []
    for low, high in pairs:
        route = [low]
        for level in range(levels[low] + 1, levels[high]):
            key = (high, True, level) if (low, high) in closing else (low, False, level)
            if key not in shared:
                shared[key] = len(levels) + len(shared)
                columns[level].append(shared[key])
            route.append(shared[key])
        routes.append([*route, high])
    return columns, routes


def _neighbours(routes: Sequence[Sequence[int]]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """For each slot, those that it is connected to in the layers before and after."""
    before: dict[int, list[int]] = {}
    after: dict[int, list[int]] = {}
    for route in routes:
        for a, b in pairwise(route):
            before.setdefault(b, []).append(a)
            after.setdefault(a, []).append(b)
    return before, after


def _order(columns: list[list[int]], routes: Sequence[Sequence[int]]) -> None:
    """Sorts each layer by the mean place of its slots' neighbours, from the left and from the right by turns."""
    before, after = _neighbours(routes)
    place = {slot: index / len(column) for column in columns for index, slot in enumerate(column)}
    for sweep in range(_SWEEPS):
        known = before if sweep % 2 == 0 else after
        for column in columns if sweep % 2 == 0 else reversed(columns):
            column.sort(key=lambda slot: _mean([place[other] for other in known.get(slot, [slot])]))
            place |= {slot: index / len(column) for index, slot in enumerate(column)}


def _places(columns: Sequence[Sequence[int]], routes: Sequence[Sequence[int]], num_nodes: int) -> dict[int, float]:
    """The height of each slot's middle: near its neighbours', in the order of its layer, without overlaps."""
    before, after = _neighbours(routes)
    middle: dict[int, float] = {}

    def settle(column: Sequence[int], wanted: Sequence[float]) -> None:
        """As near to `wanted` in least squares as the order allows: pools neighbours that would overlap."""
        halves = [(_ROW if slot < num_nodes else _LANE) / 2 for slot in column]
        offsets = [0.0, *accumulate(a + b for a, b in pairwise(halves))]
        pools: list[tuple[float, int]] = []  # (mean of wish less offset, slots)
        for wish, offset in zip(wanted, offsets, strict=True):
            mean, size = wish - offset, 1
            while pools and pools[-1][0] > mean:
                other, count = pools.pop()
                mean, size = (mean * size + other * count) / (size + count), size + count
            pools.append((mean, size))
        found = [mean for mean, size in pools for _ in range(size)]
        middle.update(zip(column, map(sum, zip(found, offsets, strict=True)), strict=True))

    for column in columns:
        settle(column, [0.0] * len(column))
    for _ in range(_SWEEPS):
        for column in columns:
            near = [before.get(slot, []) + after.get(slot, []) or [slot] for slot in column]
            settle(column, [_mean([middle[other] for other in others]) for others in near])
    top = min(middle.values()) - _ROW / 2 - _MARGIN
    return {slot: place - top for slot, place in middle.items()}


def _sides(columns: Sequence[Sequence[int]], widths: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """The left and right end of each slot: a layer is as wide as its widest node."""
    left: dict[int, int] = {}
    right: dict[int, int] = {}
    x = _MARGIN
    for column in columns:
        width = max(widths[slot] for slot in column if slot < len(widths))
        left |= dict.fromkeys(column, x)
        right |= dict.fromkeys(column, x + width)
        x += width + _BETWEEN
    return left, right


def _curve(route: Sequence[int], left: dict[int, int], right: dict[int, int], middle: dict[int, float]) -> str:
    path = f"M{right[route[0]]},{middle[route[0]]:.1f}"
    for a, b in pairwise(route):
        bend = (right[a] + left[b]) / 2
        path += f" C{bend:g},{middle[a]:.1f} {bend:g},{middle[b]:.1f} {left[b]},{middle[b]:.1f}"
        if b != route[-1]:
            path += f" H{right[b]}"
    return path


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
