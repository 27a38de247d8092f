"""Writes README's table from the committed results; `--check` only says whether it is up to date.

python -m torchlin.benchmarks.report [--check] [--results folder] [--readme file]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from torchlin.benchmarks.harness import Row, figure, meets, read, results_folder

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


def latest(rows: Iterable[Row]) -> list[list[Row]]:
    """The last full run of each machine, instruction set and thread count, in order of first appearance."""
    runs: dict[tuple[str, str, int], dict[str, list[Row]]] = {}
    for row in rows:
        if row.mode == "full":
            dates = runs.setdefault((row.machine, row.isa, row.threads), {})
            dates.setdefault(row.date, []).append(row)
    return [dates[max(dates)] for dates in runs.values()]


def _span(texts: Sequence[str]) -> str:
    """First to last of a sequence, without repetition."""
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} … {texts[-1]}"


def _measured(rows: Sequence[Row]) -> str:
    values = sorted(rows, key=lambda row: row.value)
    unit = " µs" if rows[0].relation == "minus" else ""
    return _span([figure(values[0].value), figure(values[-1].value)]) + unit


def _verdict(rows: Sequence[Row]) -> str:
    missed = [row for row in rows if not meets(row.value, row.goal)]
    if not missed:
        return "met"
    return "missed" if len(missed) == len(rows) else "missed at " + ", ".join(row.size for row in missed)


def _threads(row: Row) -> str:
    return "1 thread" if row.threads == 1 else f"{row.threads} threads"


def markdown(run: Sequence[Row]) -> str:
    """One run as a table of its rows with a goal; neighbouring sizes under one goal share a line."""
    first = run[0]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in run:
        if row.goal:
            key = (row.what, row.direction, row.case, row.alloc, row.base, row.relation, row.goal, row.dtype)
            groups.setdefault(key, []).append(row)
    lines = [
        f"{first.machine}, {first.isa}, torch {first.torch}, {_threads(first)}, {first.timer}, "
        f"{first.date[:10]}, commit {first.commit}:",
        "",
        "| what | n | dtype | timed (allocation) | over | goal | measured | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows in groups.values():
        row = rows[0]
        base = row.base if row.relation == "over" else f"minus {row.base}"
        goal = row.goal.replace("<=", "≤ ").replace(">=", "≥ ") + (" µs" if row.relation == "minus" else "")
        timed = f"{row.case} ({row.alloc})" if row.alloc else row.case
        cells = [
            row.what,
            _span([row.size for row in rows]),
            row.dtype,
            timed,
            base,
            goal,
            _measured(rows),
            _verdict(rows),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def generate(results: Path) -> str:
    """The text between README's markers: a table for each family and run."""
    parts = ["<!-- written by `python -m torchlin.benchmarks.report` from benchmarks/results -->"]
    for path in sorted(results.glob("*.csv")):
        parts += [markdown(run) for run in latest(read(path)) if any(row.goal for row in run)]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def updated(readme: str, text: str) -> str:
    """The readme with `text` between its markers.

    Raises:
        ValueError: the markers are missing, or in the wrong order.
    """
    begin, end = readme.find(BEGIN), readme.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"the readme needs a line {BEGIN} and, after it, a line {END}")
    return "\n".join(filter(None, [readme[: begin + len(BEGIN)], text, readme[end:]]))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the table; returns 1 where the check finds it out of date."""
    parser = argparse.ArgumentParser(prog="torchlin.benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the table is out of date"
    )
    parser.add_argument("--results", type=Path, help="folder of the results files")
    parser.add_argument("--readme", type=Path, help="file with the markers")
    args = parser.parse_args(argv)
    results = args.results or results_folder()
    readme = args.readme or results.parents[1] / "README.md"
    before = readme.read_text()
    after = updated(before, generate(results))
    if before == after:
        print(f"{readme.name}: up to date")
    elif args.check:
        print(
            f"{readme.name}: the table is not what {results.name} holds; "
            "run `python -m torchlin.benchmarks.report`"
        )
        return 1
    else:
        readme.write_text(after)
        print(f"{readme.name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
