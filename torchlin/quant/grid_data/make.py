"""Makes the grids that come with the library: `python -m torchlin.quant.grid_data.make [n,p ...]`.

A file is replaced only by a better grid, so every run with another --seed goes on from what earlier ones found. --effort
multiplies the time taken; at 1, all of them take about an hour of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from pathlib import Path

from torchlin.quant.grid_solver import Made, best_descent, canonical, certify, hop, solve
from torchlin.quant.grids import VERSION, Grid, grid, grid_text, read_grid

FOLDER = Path(__file__).resolve().parent
SHIPPED = (
    *((n, 2) for n in (4, 8, 16, 22, 32, 45, 64, 88, 90, 128, 181, 256, 512, 1024, 2048)),
    *((n, 3) for n in (8, 64, 512, 830, 4096)),
    *((n, 4) for n in (16, 64, 256, 4096)),
)


def make(n: int, p: int, effort: float, seed: int, best: Grid | None) -> Made:
    """The best grid of a search; in the plane one that goes on from `best`."""
    if p != 2:
        return solve(n, p, effort, seed)
    start = best_descent(n, max(1, round(effort * 20000 / n)), seed)
    hops = round(effort * 50000 / n)
    points = canonical(hop(start, hops, seed))
    found = Made(points, *certify(points))
    if best is not None:
        points = canonical(hop(best.points, hops, seed))
        found = min(found, Made(points, *certify(points)), key=lambda made: made.mse)
    return found


def table() -> str:
    """The shipped grids as a table in Markdown: error, and gain over scalar levels where a whole number has the same rate."""
    rows = ["| n | p | bits | mse | ± | scalar, same rate | gain |", "|---|---|---|---|---|---|---|"]
    for n, p in SHIPPED:
        g = grid(n, p)
        levels = round(n ** (1 / p))
        scalar = grid(levels).mse if levels**p == n else None
        error = "exact" if p == 2 else f"{g.mse_error:.0e}"
        beside = "| |" if scalar is None else f"| {scalar:.7f} | {_decibels(scalar / g.mse)} |"
        rows.append(f"| {n} | {p} | {g.bits:.4g} | {g.mse:.7f} | {error} {beside}")
    return "\n".join(rows) + "\n"


def _decibels(ratio: float) -> str:
    return f"{10 * math.log10(ratio) + 1e-6:.2f} dB"  # no -0.00


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", help="n,p of grids to make (default: all)")
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--table", action="store_true", help="print the table of what is there, and make nothing"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print(table(), end="")
        return
    wanted = [tuple(int(v) for v in text.split(",")) for text in arguments.which]
    for n, p in wanted or SHIPPED:
        name = f"optimal-p{p}-n{n}-v{VERSION}"
        path = FOLDER / f"{name}.txt"
        best = None
        with contextlib.suppress(OSError, ValueError):
            best = read_grid(path.read_text("ascii"), name)
        start = time.process_time()
        made = make(n, p, arguments.effort, arguments.seed, best)
        better = best is None or made.mse < best.mse
        if better:
            path.write_text(
                grid_text(Grid(made.points.float(), "optimal", VERSION, made.mse, made.mse_error)), "ascii"
            )
        was = "" if best is None else f", was {best.mse:.9f}"
        print(
            f"{name}: {made.mse:.9f} ± {made.mse_error:.1g}{was}, {time.process_time() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
