"""Fits the piecewise polynomials of math.h and writes tables.h: `python csrc/simd/tables.py`; needs numpy and mpmath.

Least squares at Chebyshev nodes, reweighted towards the minimax of the relative error (Lawson); coefficients
are rounded to float from the lowest up, each before the higher ones are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import mpmath as mp
import numpy as np

mp.mp.dps = 40
Function = Callable[[mp.mpf], mp.mpf]
HEAD = """\
// Written by tables.py: tables that math.h looks up, a register or two each, at the levels that have a shuffle for it.
// c[k][piece] is the coefficient of r^k of a piecewise polynomial.

"""


def minimax(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    weight, best, least = np.ones(len(b)), np.zeros(a.shape[1]), math.inf
    for _ in range(60):
        root = np.sqrt(weight)
        c = np.linalg.lstsq(a * root[:, None], b * root, rcond=None)[0]
        error = np.abs(a @ c - b)
        if error.max() < least:
            least, best = error.max(), c
        weight = weight * (error / error.max() + 1e-3)
        weight /= weight.sum()
    return best


def fit(f: Function, low: float, high: float, powers: Sequence[int]) -> list[float]:
    """Coefficients of f(r) on [low, high], of least relative error."""
    x = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(80) + 0.5) / 80)
    y = np.array([float(f(mp.mpf(v))) for v in x])
    rest, coefficients = np.ones(len(x)), []
    for i in range(len(powers)):
        basis = np.stack([x**p / y for p in powers[i:]], 1)
        coefficients.append(float(np.float32(minimax(basis, rest)[0])))
        rest = rest - coefficients[-1] * basis[:, 0]
    return coefficients


def centre_near(f: Function, low: float, high: float) -> float:
    """A float close to the middle at which f is close to a float, so that the first coefficient is hardly rounded."""
    candidates = [
        float(np.float32((low + high) / 2 + t * (high - low))) for t in np.linspace(-0.02, 0.02, 41)
    ]

    def rounding(x: float) -> float:
        y = f(mp.mpf(x))
        return abs(float((mp.mpf(float(np.float32(float(y)))) - y) / y))

    return min(candidates, key=rounding)


def around(f: Function, centre: float) -> Function:
    return lambda r: f(centre + r)


def even(f: Function, end: float, pieces: int, degree: int) -> tuple[float, list[list[float]]]:
    """The pieces' width and coefficients: piece i is centred at i times the width, the last one ends at `end`."""
    width = float(np.float32(end / (pieces - 0.5)))
    half = width / 2 * 1.0001
    rows = [[0.0, *fit(f, 1e-9, half, range(1, degree + 1))]]
    rows += [fit(around(f, i * mp.mpf(width)), -half, half, range(degree + 1)) for i in range(1, pieces)]
    return width, rows


def relative(
    f: Function, scale: float, bits: int, pieces: int, degree: int
) -> tuple[list[float], list[list[float]]]:
    """Centres and coefficients: the piece of u has the leading `bits` of the significand of scale u + 1 from 1 on."""
    centres, rows, y = [0.0] * pieces, [[0.0]] * pieces, 1.0
    for i in range(pieces):
        width = 2.0 ** math.floor(math.log2(y)) / 2**bits
        place = int(np.float32(y).view(np.uint32)) >> (23 - bits)
        low, high = (y - 1) / scale - 1e-6 * (i > 0), (y + width - 1) / scale + 1e-6
        y += width
        if i == 0 and f(mp.mpf(0)) == 0:
            centre, row = 0.0, [0.0, *fit(f, 1e-9, high, range(1, degree + 1))]
        else:
            centre = centre_near(f, low, high)
            row = fit(around(f, centre), low - centre, high - centre, range(degree + 1))
        centres[place % pieces], rows[place % pieces] = centre, row
    return centres, rows


def reciprocals() -> dict[str, list[float]]:
    """Of the centres of 16 pieces of [3/4, 3/2), by the leading bits of the significand, and their logarithms."""
    near, log, high, low = [], [], [], []
    for i in range(16):
        middle = (1 + (i + 0.5) / 16) / (1 if i < 8 else 2)
        choices = [float(np.float32(1 / middle + k * 2.0**-22)) for k in range(-3000, 3000)]
        logs = [-mp.log(mp.mpf(c)) for c in choices]
        rounding = [abs(float((mp.mpf(float(np.float32(float(v)))) - v) / v)) if v else 1.0 for v in logs]
        best = 1.0 if i in (0, 15) else choices[int(np.argmin(rounding))]
        exact = -mp.log(mp.mpf(best))
        near.append(best)
        log.append(float(exact))
        high.append(float(mp.nint(exact / mp.log(2) * 2**14)) / 2**14)
        low.append(float(exact / mp.log(2) - high[-1]))
    return {"kReciprocal": near, "kLogReciprocal": log, "kLog2High": high, "kLog2Low": low}


def numbers(values: Sequence[float], indent: str) -> str:
    lines = [indent]
    for v in values:
        text = f"{np.float32(v):.9g}"
        text += "f, " if "." in text or "e" in text else ".0f, "
        if len(lines[-1]) + len(text) > 126:
            lines.append(indent)
        lines[-1] += text
    return "\n".join(line.rstrip() for line in lines).removesuffix(",")


def row(name: str, values: Sequence[float]) -> str:
    return f"alignas(64) inline constexpr float {name}[{len(values)}] = {{\n{numbers(values, '    ')}}};\n"


def rows(name: str, pieces: list[list[float]]) -> str:
    body = "".join(f"    {{{numbers(c, '     ').lstrip()}}},\n" for c in zip(*pieces, strict=True))
    return f"alignas(64) inline constexpr float {name}[{len(pieces[0])}][{len(pieces)}] = {{\n{body}}};\n"


def tail(a: mp.mpf) -> mp.mpf:
    return mp.exp(a * a / 2) * mp.ncdf(-a)


def level(lanes: int) -> str:
    wide = lanes == 16
    out = row("kExp", [2.0 ** (i / 16 if wide else i / 4) for i in range(lanes)])
    out += "constexpr float kErfOne = 3.926f;  // erf is 1 from here on\n"
    width, pieces = even(mp.erf, 3.9262, lanes, 5 if wide else 6)
    out += f"constexpr float kErfWidth = {width:.9g}f;\n" + rows("kErf", pieces)
    width, pieces = even(mp.log1p, 1 + 0.5 / (lanes - 1), lanes, 4 if wide else 5)
    out += f"constexpr float kLog1pWidth = {width:.9g}f;\n" + rows("kLog1p", pieces)
    centres, pieces = relative(tail, 1.0, 3 if wide else 1, 32 if wide else 8, 4 if wide else 7)
    out += row("kTailCentre", centres) + rows("kTail", pieces)
    if wide:
        centres, pieces = relative(mp.tanh, 1.62, 2, 16, 5)
        out += row("kTanhCentre", centres) + rows("kTanh", pieces)
    return out


def main() -> None:
    text = HEAD + "".join(row(name, values) for name, values in reciprocals().items())
    text += f"\n#if TORCHLIN_ISA_BYTES == 64\n{level(16)}#else\n{level(8)}#endif\n"
    Path(__file__).with_name("tables.h").write_text(text)


if __name__ == "__main__":
    main()
