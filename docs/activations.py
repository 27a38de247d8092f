"""Draws docs/activations.md: every activation of the catalogue, with its derivative and what is known of it.

    python docs/activations.py            # writes the page and its pictures
    python docs/activations.py --check    # only tells whether they are up to date

The pictures are sheets of up to 20 panels: a page of 486 files would be refused in part by hosts that count
requests.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import torch

import torchlin.catalogue
from torchlin import show
from torchlin._curves import HIGH, Picture, Points, picture, ticks
from torchlin.catalogue import Activation, Parameter, catalogue

HERE = Path(__file__).resolve().parent
PAGE, FOLDER = "activations.md", "activations"

COLUMNS, ROWS = 5, 4  # of a sheet, at most
WIDTH, HEIGHT = 160, 120  # pixels of a window
PANEL = (172, 156)  # with its title and border
LEFT, TOP = 6, 26  # of the window in its panel
UNIT = 10  # coordinates in a pixel

Drawn: TypeAlias = tuple[Activation, Picture]

STYLE = """
text{font:10px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#8b949e}
.t{font-size:12px;font-weight:600;fill:#1f2328}.n{font-size:10px}
rect{fill:#fff;stroke:#d8dee4}
path{fill:none;stroke-width:10;stroke-linejoin:round;stroke-linecap:round}
.g{stroke:#eceff2}.a{stroke:#b4bcc5}
.f{stroke:#1f6feb;stroke-width:20}.d{stroke:#e8590c;stroke-width:14}
.o{stroke:#1f6feb;stroke-width:12;opacity:.4}
@media(prefers-color-scheme:dark){text{fill:#7d8590}.t{fill:#e6edf3}rect{fill:#0d1117;stroke:#30363d}
.g{stroke:#1c222a}.a{stroke:#57606a}.f,.o{stroke:#58a6ff}.d{stroke:#ff9f5a}}
""".replace("\n", "")

HEAD = """\
<!-- written by docs/activations.py (make docs) from torchlin/catalogue; edits belong there -->

# Activations

{count} names, {aliases} more aliases, {functions} functions with a kernel of their own. Each picture has f in **blue** and its
derivative f′ in **orange**, over [-4, 4] unless its axis says otherwise; where the window is 6 high, a slope of 1 rises at 45°.
Parameters are at their defaults.

```python
import torch, torchlin

y = torchlin.functional.activation(torch.randn(8), "mish")
layer = torchlin.create("activation", "prelu", a=0.1)  # its parameters learn where the table says
```

`torchlin show mish` prints one of them with a plot, `torchlin list activation '*gelu*'` searches.
[How to add one](add-an-activation.md): a few lines in a file.

**Checked** tells how a formula was verified; a dash means that it was not: it stands as its source, often a survey, prints it.
**=** are names of the same function; **≐** those equal to it as long as the parameters of both are at their defaults.
Formulas are those of [the catalogue](../torchlin/catalogue), whose first lines say what its functions mean.

{contents}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws the gallery of activations.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if something is out of date")
    check = parser.parse_args(argv).check
    files = gallery()
    stale = [name for name, text in files.items() if _read(HERE / name) != text]
    stale += [
        f"{FOLDER}/{p.name}" for p in (HERE / FOLDER).glob("*.svg") if f"{FOLDER}/{p.name}" not in files
    ]
    if check:
        if stale:
            print(f"out of date: {', '.join(stale)}; run: make docs", file=sys.stderr)
        return 1 if stale else 0
    (HERE / FOLDER).mkdir(exist_ok=True)
    for name in stale:
        if name in files:
            (HERE / name).write_text(files[name], encoding="utf-8")
        else:
            (HERE / name).unlink()
    print(f"{len(files)} files, {sum(map(len, files.values())) / 1e6:.2f} MB; {len(stale)} of them changed")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def gallery() -> dict[str, str]:
    """The page and its sheets, as {path in docs/: text}."""
    torch.set_num_threads(1)  # pieces of 200 elements; more threads only wait for each other
    files: dict[str, str] = {}
    sections, contents = [], []
    for title, text, rows in families():
        anchor = re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))
        contents.append(f"[{title}](#{anchor}) ({len(rows)})")
        sections.append(f"## {title}\n\n{text}\n")
        sheets = _even(rows, COLUMNS * ROWS)
        for i, some in enumerate(sheets):
            name = f"{FOLDER}/{anchor}{f'-{i + 1}' if len(sheets) > 1 else ''}.svg"
            drawn = [(a, picture(a)) for a in some]
            files[name] = sheet(drawn)
            names = ", ".join(a.name for a in some)
            sections.append(f"![{names}]({name})\n\n{table(drawn)}\n")
    from torchlin.catalogue.kernels import kernels

    everything = catalogue().values()
    head = HEAD.format(
        count=len(everything),
        aliases=sum(len(a.aliases) for a in everything),
        functions=len(kernels()),
        contents=" · ".join(contents),
    )
    return {PAGE: "\n".join([head, *sections]), **files}


def families() -> Iterator[tuple[str, str, list[Activation]]]:
    """Title, first sentence and activations of each file of the catalogue."""
    for path in sorted(Path(torchlin.catalogue.__file__).parent.glob("*.ini")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(re.match(r"(?:#.*\n)*", text)[0].replace("#", "").split())  # type: ignore[index]
        sentence = re.split(r"(?<=\.)\s", comment)[0]
        names = re.findall(r"^\[(\w+)\]$", text, re.MULTILINE)
        rows = [catalogue()[name] for name in names if name in catalogue()]
        yield path.stem.replace("_", " ").capitalize(), sentence, rows


def _even(rows: list[Activation], most: int) -> list[list[Activation]]:
    """In parts of whole lines of panels, as alike as possible."""
    parts = math.ceil(len(rows) / most)
    lines = math.ceil(len(rows) / COLUMNS)
    each = math.ceil(lines / parts) * COLUMNS
    return [rows[i : i + each] for i in range(0, len(rows), each)]


# ------------------------------------------------------------------------------------------------------ drawing


def sheet(rows: list[Drawn]) -> str:
    """An SVG file of panels, one for each activation."""
    across, down = min(COLUMNS, len(rows)), math.ceil(len(rows) / COLUMNS)
    width, height = across * (PANEL[0] + 4) - 4 + 2, down * (PANEL[1] + 4) - 4 + 2
    panels = []
    for i, drawn in enumerate(rows):
        x, y = 1 + i % COLUMNS * (PANEL[0] + 4), 1 + i // COLUMNS * (PANEL[1] + 4)
        panels.append(f'<g transform="translate({x} {y})">{panel(*drawn)}</g>')
    box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n<style>{STYLE}</style>\n'
        + "\n".join(panels)
        + "\n</svg>\n"
    )


def panel(activation: Activation, p: Picture) -> str:
    grid, labels = _grid(p)
    paths = [("g", grid), ("a", _axes(p))]
    paths += [(role[0], _path(p, p.pieces(role))) for role in ("other", "derivative", "f")]
    curves = "".join(f'<path class="{kind}" d="{d}"/>' for kind, d in paths if d)
    remark = [f"over {p.axis}"] * (p.axis != "x") + [f"to ±{p.high:g}"] * (p.high != HIGH)
    beside = escape(", ".join(remark))
    axis = f'<text x="{PANEL[0] - 7}" y="16" text-anchor="end">{beside}</text>' if remark else ""
    fits = 7 * len(activation.name) + 5 * len(beside) < PANEL[0] - 20
    return (
        f'<rect width="{PANEL[0]}" height="{PANEL[1]}" rx="6"/>'
        f'<text class="{"t" if fits else "t n"}" x="8" y="17">{activation.name}</text>'
        f"{axis}{labels}"
        f'<g transform="translate({LEFT} {TOP})scale({1 / UNIT:g})">{curves}</g>'
    )


def _place(p: Picture, x: float, y: float) -> tuple[int, int]:
    """Coordinates in the window, whole numbers; a hair down, so that ties go the same way on every machine."""
    return (
        math.floor((x - p.low) / (p.high - p.low) * WIDTH * UNIT + 0.5 - 1e-6),
        math.floor((p.top - y) / (p.top - p.bottom) * HEIGHT * UNIT + 0.5 - 1e-6),
    )


def _grid(p: Picture) -> tuple[str, str]:
    """Lines at round numbers, and the labels of a few of them."""
    d, labels = [], []
    for x in ticks(p.low, p.high, 4):
        left, _ = _place(p, x, p.top)
        if 0 < left < WIDTH * UNIT and x:
            d.append(f"M{left} 0V{HEIGHT * UNIT}")
    ys = [y for y in ticks(p.bottom, p.top, 4) if y]
    for y in ys:
        _, down = _place(p, p.low, y)
        if 0 < down < HEIGHT * UNIT:
            d.append(f"M0 {down}H{WIDTH * UNIT}")
    zero = _place(p, 0, 0)
    for y in [y for y in ys if 60 < _place(p, 0, y)[1] < HEIGHT * UNIT - 20]:
        labels.append((zero[0] / UNIT + LEFT - 3, _place(p, 0, y)[1] / UNIT + TOP + 3, f"{y:g}", "end"))
    shown = "".join(
        f'<text x="{x:g}" y="{y:g}"{f" text-anchor={chr(34)}{anchor}{chr(34)}" if anchor else ""}>{text}</text>'
        for x, y, text, anchor in labels
    )
    return "".join(d), shown


def _axes(p: Picture) -> str:
    x, y = _place(p, 0, 0)
    down = f"M{x} 0V{HEIGHT * UNIT}" if p.low <= 0 <= p.high else ""
    across = f"M0 {y}H{WIDTH * UNIT}" if p.bottom <= 0 <= p.top else ""
    return down + across


def _path(p: Picture, pieces: list[Points]) -> str:
    """The curve as an SVG path of relative whole steps, without points that nobody would miss."""
    text = []
    for piece in pieces:
        points = _thin([_place(p, x, y) for x, y in piece])
        text.append(f"M{points[0][0]} {points[0][1]}l")
        steps = [f"{x1 - x0} {y1 - y0}" for (x0, y0), (x1, y1) in pairwise(points)]
        text.append(" ".join(steps))
    return re.sub(r" (?=-)", "", "".join(text))


def _thin(points: list[tuple[int, int]], tolerance: float = 2.5) -> list[tuple[int, int]]:
    """Douglas and Peucker 1973: the curve stays within a quarter of a pixel."""
    kept = [points[0]]

    def between(first: int, last: int) -> None:
        (x0, y0), (x1, y1) = points[first], points[last]
        dx, dy = x1 - x0, y1 - y0
        worst, where = 0, 0
        for i in range(first + 1, last):
            x, y = points[i]
            off = abs(dx * (y - y0) - dy * (x - x0)) if dx or dy else abs(x - x0) + abs(y - y0)
            if off > worst:
                worst, where = off, i
        if worst > tolerance * (math.hypot(dx, dy) or 1):
            between(first, where)
            kept.append(points[where])
            between(where, last)

    between(0, len(points) - 1)
    return [*kept, points[-1]]


# ------------------------------------------------------------------------------------------------------- tables


def table(rows: list[Drawn]) -> str:
    lines = ["| name | formula | parameters | source | checked |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(row(*drawn) for drawn in rows)])


def row(a: Activation, p: Picture) -> str:
    name = f'<a id="{a.name}"></a>**{a.name}**'
    if _plain(a.display) != _plain(a.name):
        name += f"<br>{a.display}"
    if a.aliases:
        name += f"<br><sub>{', '.join(a.aliases)}</sub>"
    source = a.source + (f" ({a.year})" if a.year and str(a.year) not in a.source else "")
    cells = [
        name,
        _formula(a, p),
        "<br>".join(map(_parameter, a.parameters.values())),
        _text(source),
        _text(a.verified or "–"),
    ]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _plain(name: str) -> str:
    return re.sub(r"\W|_", "", name.lower())


def _formula(a: Activation, p: Picture) -> str:
    if a.same_as:
        parts = [f"`{a.graph}`"]
    elif a.formula:
        parts = [f"`{line}`" for line in show.formula(a)]
    else:
        parts = []
    if p.caption:
        parts.append(f"*Picture: {p.caption}.*")
    if a.note:
        parts.append(_text(a.note))
    if same := show.relatives(a):
        parts.append("= " + ", ".join(map(_link, same)))
    known = {other.name for other in same}
    if equal := [n for n in show.equal_by_default(a.name) if n not in known]:
        parts.append("≐ " + ", ".join(f"[{n}](#{n})" for n in equal))
    return "<br>".join(parts)


def _link(a: Activation) -> str:
    more = show.as_another(a).removeprefix(a.name)
    return f"[{a.name}](#{a.name})" + f" `{more.strip()}`" * bool(more)


def _text(words: str) -> str:
    """Words of the catalogue as Markdown that shows them as they are."""
    return re.sub(r"([*_<`])", r"\\\1", words)


def _parameter(p: Parameter) -> str:
    return " ".join(
        [f"{p.name} = {show.number_text(p)}", *(f"<sub>{t}</sub>" for t in [", ".join(show.traits(p))] if t)]
    )


if __name__ == "__main__":
    raise SystemExit(main())
