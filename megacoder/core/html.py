"""Self-contained HTML reports: one file, no scripts, nothing fetched; charts are inline SVG.

Values are escaped here, so that callers pass plain text: file names and code samples may hold anything.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "code", "line_chart", "page", "paragraph", "picture", "section", "tiles", "value_table"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5f6b78; --line: #d9dfe6; --page: #fff; --panel: #f5f7f9;
        --good: #cdeed6; --s0: #2563eb; --s1: #d9480f; --s2: #0f9960;
        --s3: #8b3fd1; --s4: #64748b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --soft: #98a4b1; --line: #35404b; --page: #14191f; --panel: #1d242c; --good: #1f4d31;
          --s0: #78a9ff; --s1: #ff9a5c; --s2: #5fd39b;
          --s3: #c79bf2; --s4: #a3b1c2; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 960px;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .25rem; }
th, td { text-align: right; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } .text { text-align: left; white-space: normal; overflow-wrap: break-word; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
      overflow-x: auto; font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; }
mark { background: var(--good); color: inherit; border-radius: 3px; padding: 0 .15rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem;
        min-width: 9rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
"""


_MOST_DOTS = 40
"""Points of a line up to which each has a dot, so that few are seen as what they are, and a single one at all."""


@dataclass(frozen=True)
class Series:
    """A line of a chart: points (x, y) in rising x."""

    name: str
    points: Sequence[tuple[float, float]]


def page(title: str, lead: str, body: Sequence[str]) -> str:
    """A complete document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p>\n' + "\n".join(body) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what comes under it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """(label, value) pairs as a row of large figures."""
    cells = [f'<div class="tile">{escape(label)}<b>{escape(value)}</b></div>' for label, value in items]
    return f'<div class="tiles">{"".join(cells)}</div>'


def value_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", num_texts: int = 1) -> str:
    """A table; the first `num_texts` columns are text, the others are figures."""

    def line(cells: Sequence[str], tag: str) -> str:
        looks = [' class="text"' if index < num_texts else "" for index in range(len(cells))]
        return "".join(f"<{tag}{look}>{escape(cell)}</{tag}>" for look, cell in zip(looks, cells, strict=True))

    head = line(columns, "th")
    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def code(before: str, marked: str = "", after: str = "") -> str:
    """Preformatted text with a marked part in the middle."""
    middle = f"<mark>{escape(marked)}</mark>" if marked else ""
    return f"<pre>{escape(before)}{middle}{escape(after)}</pre>"


def picture(svg: bytes, *, describes: str) -> str:
    """An SVG file as it is, in its own colors and size; what is too wide scrolls."""
    data = base64.b64encode(svg).decode()
    return f'<div class="scroll"><img src="data:image/svg+xml;base64,{data}" alt="{escape(describes)}"></div>'


def line_chart(series: Sequence[Series], y_label: str) -> str:
    """Lines over steps, with linear axes; points that are not finite are skipped."""
    lines = [Series(s.name, [p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    points = [point for line in lines for point in line.points]
    if not points:
        return paragraph("No points to draw.")
    xs, ys = _ticks(*_span(x for x, _ in points)), _ticks(*_span(y for _, y in points))
    width, height, left, right, top, bottom = 900, 300, 56, 24, 28, 40
    span_x, span_y = xs[-1] - xs[0], ys[-1] - ys[0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - xs[0]) / span_x * (width - left - right)
        return across, height - bottom - (y - ys[0]) / span_y * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)} over step">']
    for y in ys:
        across, down = place(xs[0], y)
        parts.append(f'<line x1="{across}" y1="{down:.1f}" x2="{width - right}" y2="{down:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 8}" y="{down + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        across, _ = place(x, ys[0])
        parts.append(f'<text x="{across:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{left}" y="14">{escape(y_label)}</text>')
    legend = width - right
    for index, line in reversed(list(enumerate(lines))):
        places = [place(*point) for point in line.points]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        color = f"var(--s{index % 5})"
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(places) <= _MOST_DOTS:
            parts += [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.4" fill="{color}"/>' for across, down in places]
        legend -= 8 * len(line.name) + 34
        parts.append(f'<line x1="{legend}" y1="10" x2="{legend + 16}" y2="10" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{legend + 21}" y="14">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _span(values: Iterable[float]) -> tuple[float, float]:
    numbers = list(values)
    return min(numbers), max(numbers)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose [low, high], about `count` of them."""
    if high <= low:  # a share or a count that stays at 0 is never below 0
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]
