"""Curves in a terminal: braille dots on a frame of box characters, or plain ASCII where there is no Unicode."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torchlin._curves import Points, ticks

# Bits of a braille cell, by row and column of its 4 x 2 dots.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
# ASCII has three heights in a character: by the bits of upper 1, middle 2 and lower 4.
_ASCII = " '-:.::|"
_AXES = {True: ("│", "─", "┼"), False: ("|", "-", "+")}


class Plot:
    """A frame of `columns` x `rows` characters for the window [low, high] x [bottom, top]."""

    def __init__(
        self, columns: int, rows: int, window: tuple[float, float, float, float], *, unicode: bool = True
    ) -> None:
        self.columns, self.rows, self.unicode = columns, rows, unicode
        self.low, self.high, self.bottom, self.top = window
        self._wide, self._tall = (2, 4) if unicode else (1, 3)
        self._dots = [[0] * columns for _ in range(rows)]  # bits as in _DOTS, or 1 << height
        self._faint = [[0] * columns for _ in range(rows)]

    def draw(self, pieces: Sequence[Points], *, faint: bool = False) -> None:
        """Adds curves; faint ones show only where no other curve goes, and as every second dot."""
        where = self._faint if faint else self._dots
        for piece in pieces:
            for i, (column, row) in enumerate(self._raster(piece)):
                if not faint or i % (2 if self.unicode else 1) == 0:
                    bit = _DOTS[row % 4][column % 2] if self.unicode else 1 << row % 3
                    where[row // self._tall][column // self._wide] |= bit

    def _raster(self, piece: Points) -> Iterator[tuple[int, int]]:
        """The dots of a curve, each once in a row, without gaps."""
        width, height = self.columns * self._wide, self.rows * self._tall
        last: tuple[int, int] | None = None
        for (x0, y0), (x1, y1) in pairwise(self._to_dots(p) for p in piece):
            steps = max(1, math.ceil(2 * max(abs(x1 - x0), abs(y1 - y0))))
            for i in range(steps + 1):
                x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
                dot = min(width - 1, max(0, int(x))), min(height - 1, max(0, int(y)))
                if dot != last:
                    yield dot
                    last = dot

    def _to_dots(self, point: tuple[float, float]) -> tuple[float, float]:
        x = (point[0] - self.low) / (self.high - self.low) * self.columns * self._wide
        y = (self.top - point[1]) / (self.top - self.bottom) * self.rows * self._tall
        # A hair, so that what lies on the border between two rows of dots always goes to the same one.
        return x + 1e-9, y + 1e-9

    def lines(self, paint: str = "") -> list[str]:
        """The picture with its labels, a line each; `paint` is the escape sequence of the curves' colour."""
        labels = {self._row(y): f"{y:g}" for y in ticks(self.bottom, self.top, max(2, self.rows // 3))}
        margin = max(map(len, labels.values()), default=0)
        shown = [
            f"{labels.get(row, ''):>{margin}} " + "".join(self._cells(row, paint)).rstrip()
            for row in range(self.rows)
        ]
        return [*shown, " " * (margin + 1) + self._below()]

    def _cells(self, row: int, paint: str) -> Iterator[str]:
        across = self._row(0.0) == row and self.bottom <= 0 <= self.top
        down = self._column(0.0) if self.low <= 0 <= self.high else None
        vertical, horizontal, both = _AXES[self.unicode]
        for column in range(self.columns):
            dots = self._dots[row][column]
            if dots:
                yield f"{paint}{self._mark(dots)}\033[0m" if paint else self._mark(dots)
            elif faint := self._faint[row][column]:
                yield self._mark(faint) if self.unicode else ":"
            elif across:
                yield both if column == down else horizontal
            else:
                yield vertical if column == down else " "

    def _mark(self, dots: int) -> str:
        return chr(0x2800 + dots) if self.unicode else _ASCII[dots]

    def _row(self, y: float) -> int:
        return min(self.rows - 1, int((self.top - y) / (self.top - self.bottom) * self.rows + 1e-9))

    def _column(self, x: float) -> int:
        return min(self.columns - 1, int((x - self.low) / (self.high - self.low) * self.columns + 1e-9))

    def _below(self) -> str:
        line = [" "] * self.columns
        end = 0
        for x in ticks(self.low, self.high, max(2, self.columns // 7)):
            text = f"{x:g}"
            start = min(max(0, self._column(x) - len(text) // 2), self.columns - len(text))
            if start >= end:
                line[start : start + len(text)] = text
                end = start + len(text) + 1
        return "".join(line).rstrip()


def beside(left: Sequence[str], right: Sequence[str], width: int, gap: int = 3) -> list[str]:
    """Two blocks of lines next to each other; `width` is how wide the left one looks, escapes apart."""
    rows = max(len(left), len(right))
    padded = [*left, *[""] * (rows - len(left))]
    other = [*right, *[""] * (rows - len(right))]
    seen = (len(re.sub(r"\033\[[0-9;]*m", "", line)) for line in padded)
    return [f"{a}{' ' * (width - n + gap)}{b}".rstrip() for a, b, n in zip(padded, other, seen, strict=True)]
