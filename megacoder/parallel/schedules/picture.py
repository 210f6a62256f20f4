"""Boxes and short texts as SVG or PNG, with the standard library and numpy alone.

A figure of a schedule needs no more than this, and a plotting library would be the largest dependency of the package.
SVG keeps text as text; PNG uses the font drawn below: capitals, digits and a little punctuation.
"""

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np

from megacoder.core.errors import ConfigError
from megacoder.core.files import replacing

__all__ = ["TEXT_HEIGHT", "Box", "Picture", "Text", "text_width"]

Color = tuple[int, int, int]

_PIXEL = 2  # pixels of a PNG per dot of the font
TEXT_HEIGHT = 7 * _PIXEL
"""Height of a capital in pixels."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A filled rectangle; pixels from the upper left corner."""

    x: float
    y: float
    width: float
    height: float
    color: Color


@dataclass(frozen=True, kw_only=True)
class Text:
    """One line of text; its capitals reach from `y` down to the baseline at `y + TEXT_HEIGHT`."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    """which point of the text `x` is"""
    color: Color = (51, 51, 51)


@dataclass(kw_only=True)
class Picture:
    """What to draw, from back to front."""

    width: int
    height: int
    boxes: list[Box] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes SVG or PNG, as the suffix of `path` says; ConfigError for any other."""
        encode = {".svg": self.svg, ".png": self._png}.get(path.suffix.lower())
        if encode is None:
            raise ConfigError(f"cannot draw to {path}: the name must end in .png or .svg")
        with replacing(path) as temporary:
            temporary.write_bytes(encode())

    def svg(self) -> bytes:
        """The picture as a standalone SVG file."""
        size = f'width="{self.width}" height="{self.height}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, sans-serif" font-size="16">',
            f'<rect {size} fill="white"/>',
        ]
        for box in self.boxes:
            place = f'x="{box.x:.2f}" y="{box.y:g}" width="{box.width:.2f}" height="{box.height:g}"'
            lines.append(f'<rect {place} fill="{_hex(box.color)}"/>')
        for text in self.texts:
            place = f'x="{text.x:.2f}" y="{text.y + TEXT_HEIGHT - 1:g}" text-anchor="{text.anchor}"'
            lines.append(f'<text {place} fill="{_hex(text.color)}">{escape(text.text)}</text>')
        return "\n".join([*lines, "</svg>", ""]).encode()

    def _png(self) -> bytes:
        image = np.full((self.height, self.width, 3), 255, dtype=np.uint8)
        for box in self.boxes:
            left, top, right, bottom = (round(v) for v in (box.x, box.y, box.x + box.width, box.y + box.height))
            image[top:bottom, left:right] = box.color
        for text in self.texts:
            dots = np.kron(_dots(text.text), np.ones((_PIXEL, _PIXEL), dtype=bool))
            shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.anchor]
            left, top = round(text.x - shift * dots.shape[1]), round(text.y)
            canvas = image[top : top + dots.shape[0], left : left + dots.shape[1]]
            canvas[dots[: canvas.shape[0], : canvas.shape[1]]] = text.color
        rows = np.zeros((self.height, 1 + 3 * self.width), dtype=np.uint8)  # each row begins with its filter, 0: none
        rows[:, 1:] = image.reshape(self.height, -1)
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)  # 8 bits, RGB
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )


def text_width(text: str) -> int:
    """Width in pixels as PNG draws it; SVG's is a little less."""
    return (6 * len(text) - 1) * _PIXEL


def _hex(color: Color) -> str:
    return "#" + bytes(color).hex()


def _dots(text: str) -> np.ndarray:
    """(7, 6 * len - 1) of bool: the font's dots, one empty column between characters; unknown ones stay empty."""
    blank = [" " * 5] * 7
    rows = zip(*(_FONT.get(char, blank) for char in text.upper()), strict=True)
    return np.array([[dot == "#" for dot in " ".join(row)] for row in rows])


_FONT_ROWS = {
    "ABCDEFGHIJKLMN": (
        " ###  ####   #### ####  ##### #####  #### #   #  ###    ### #   # #     #   # #   #",
        "#   # #   # #     #   # #     #     #     #   #   #      #  #  #  #     ## ## ##  #",
        "#   # #   # #     #   # #     #     #     #   #   #      #  # #   #     # # # ##  #",
        "##### ####  #     #   # ####  ####  #  ## #####   #      #  ##    #     # # # # # #",
        "#   # #   # #     #   # #     #     #   # #   #   #      #  # #   #     #   # #  ##",
        "#   # #   # #     #   # #     #     #   # #   #   #   #  #  #  #  #     #   # #  ##",
        "#   # ####   #### ####  ##### #      #### #   #  ###   ##   #   # ##### #   # #   #",
    ),
    "OPQRSTUVWXYZ01": (
        " ###  ####   ###  ####   #### ##### #   # #   # #   # #   # #   # #####  ###    #  ",
        "#   # #   # #   # #   # #       #   #   # #   # #   # #   # #   #     # #   #  ##  ",
        "#   # #   # #   # #   # #       #   #   # #   # #   #  # #   # #     #  #  ##   #  ",
        "#   # ####  #   # ####   ###    #   #   # #   # # # #   #     #     #   # # #   #  ",
        "#   # #     # # # # #       #   #   #   #  # #  # # #  # #    #    #    ##  #   #  ",
        "#   # #     #  #  #  #      #   #   #   #  # #  ## ## #   #   #   #     #   #   #  ",
        " ###  #      ## # #   # ####    #    ###    #   #   # #   #   #   #####  ###   ### ",
    ),
    "23456789%.,:-+": (
        " ###  ####     #  #####  ###  #####  ###   ###  ##  #                              ",
        "#   #     #   ##  #     #         # #   # #   # ##  #              ##           #  ",
        "    #     #  # #  ####  #        #  #   # #   #    #               ##           #  ",
        "   #   ###  #  #      # ####    #    ###   ####   #                      ###  #####",
        "  #       # #####     # #   #   #   #   #     #  #           ##    ##           #  ",
        " #        #    #  #   # #   #  #    #   #     # #  ##  ##     #    ##           #  ",
        "##### ####     #   ###   ###   #     ###   ###  #  ##  ##    #                     ",
    ),
}
_FONT = {
    char: [row[6 * i : 6 * i + 5] for row in rows] for chars, rows in _FONT_ROWS.items() for i, char in enumerate(chars)
}
