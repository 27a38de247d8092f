"""Writes the tables of README and docs from the committed results; `--check` only says whether they are up to date.

    python -m torchlin.benchmarks.report [--check] [--results folder] [file ...]

A table stands between `<!-- benchmark:begin NAME -->` and `<!-- benchmark:end -->`; `BLOCKS` are the names,
and no name stands for the goals of all families.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torchlin.benchmarks.experiment import Measured, grouped, summary
from torchlin.benchmarks.harness import Row, figure, meets, read, results_folder
from torchlin.benchmarks.train_activation import COLUMNS as TRAINED_COLUMNS
from torchlin.benchmarks.train_activation import Trained, lines

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
BLOCK = re.compile(
    r"(?P<begin><!-- benchmark:begin ?(?P<name>[\w-]*) ?-->)(?P<text>.*?)(?P<end><!-- benchmark:end -->)",
    re.S,
)
MADE_BY = "<!-- written by `python -m torchlin.benchmarks.report` from benchmarks/results -->"


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


def _threads(row: Row | Trained | Measured) -> str:
    return "1 thread" if row.threads == 1 else f"{row.threads} threads"


def _heading(row: Row) -> str:
    return (
        f"{row.machine}, {row.isa}, torch {row.torch}, {_threads(row)}, {row.timer}, "
        f"{row.date[:10]}, commit {row.commit}:"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = ["".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in (columns, *rows)]
    return "\n".join([text[0], "|---" * len(columns) + "|", *text[1:]])


def _limit(row: Row) -> str:
    return row.goal.replace("<=", "≤ ").replace(">=", "≥ ") + (" µs" if row.relation == "minus" else "")


def _base(row: Row) -> str:
    return row.base if row.relation == "over" else f"minus {row.base}"


def _timed(row: Row) -> str:
    return f"{row.case} ({row.alloc})" if row.alloc else row.case


def _grouped(run: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> list[list[Row]]:
    """The rows with a goal, those of one key together, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in run:
        if row.goal:
            groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def by_size(run: Sequence[Row]) -> str:
    """One run as a table of its rows with a goal; neighbouring sizes under one goal share a line."""
    cells = []
    for rows in _grouped(
        run, lambda r: (r.what, r.direction, r.case, r.alloc, r.base, r.relation, r.goal, r.dtype)
    ):
        row = rows[0]
        sizes = _span([row.size for row in rows])
        cells.append(
            [
                row.what,
                sizes,
                row.dtype,
                _timed(row),
                _base(row),
                _limit(row),
                _measured(rows),
                _verdict(rows),
            ]
        )
    columns = ("what", "n", "dtype", "timed (allocation)", "over", "goal", "measured", "")
    return f"{_heading(run[0])}\n\n{_table(columns, cells)}"


def _names(rows: Sequence[Row], most: int = 6) -> str:
    names = [row.what for row in rows]
    return (
        ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"
    )


def _with_names(rows: Sequence[Row]) -> str:
    values = sorted(rows, key=lambda row: row.value)
    unit = " µs" if rows[0].relation == "minus" else ""
    ends = values if len(values) == 1 else (values[0], values[-1])
    return " … ".join(f"{figure(row.value)}{unit} ({row.what})" for row in ends)


def by_name(run: Sequence[Row]) -> str:
    """One run as a table of its rows with a goal; functions under one goal share a line."""
    cells = []
    for rows in _grouped(
        run, lambda r: (r.direction, r.size, r.dtype, r.case, r.alloc, r.base, r.relation, r.goal)
    ):
        row = rows[0]
        missed = [row for row in rows if not meets(row.value, row.goal)]
        verdict = (
            "met" if not missed else "missed" if len(missed) == len(rows) else f"missed: {_names(missed)}"
        )
        cells.append(
            [
                row.direction,
                _names(rows),
                row.size,
                row.dtype,
                _timed(row),
                _base(row),
                _limit(row),
                _with_names(rows),
                verdict,
            ]
        )
    columns = ("", "functions", "n", "dtype", "timed (allocation)", "over", "goal", "measured", "")
    return f"{_heading(run[0])}\n\n{_table(columns, cells)}"


LIMITS = (1.1, 1.3, 1.5, 2.0)


def _counted(rows: Sequence[Row], goal: str) -> list[str]:
    ordered = sorted(rows, key=lambda row: row.value)
    met = str(sum(bool(meets(row.value, row.goal)) for row in rows)) if goal else ""
    within = [str(sum(row.value <= limit for row in rows)) for limit in LIMITS]
    middle, worst = ordered[len(ordered) // 2], ordered[-1]
    ends = [figure(middle.value), f"{figure(worst.value)} ({worst.what})"]
    return [rows[0].direction, rows[0].base, goal, str(len(rows)), met, *within, *ends]


def catalogue_counts(run: Sequence[Row]) -> str:
    """How many names are how near to their floor: all of a direction, then those of each goal."""
    cells = []
    for direction in dict.fromkeys(row.direction for row in run):
        rows = [row for row in run if row.direction == direction]
        cells.append(_counted(rows, ""))
        for goal in dict.fromkeys(row.goal for row in rows if row.goal):
            of_goal = [row for row in rows if row.goal == goal]
            cells.append(_counted(of_goal, _limit(of_goal[0])))
    columns = ("", "over", "goal", "names", "met", *(f"≤ {limit:g}" for limit in LIMITS), "median", "worst")
    return f"{_heading(run[0])}\n\n{_table(columns, cells)}"


WORST = 30


def catalogue_worst(run: Sequence[Row]) -> str:
    """The names that are furthest from a copy, and how far their backward is from its floor."""
    backward = {row.what: row for row in run if row.direction == "backward"}
    forward = sorted((row for row in run if row.direction == "forward"), key=lambda row: -row.value)[:WORST]
    cells = [
        [
            row.what,
            figure(row.value),
            _limit(row),
            figure(backward[row.what].value) if row.what in backward else "",
        ]
        for row in forward
    ]
    columns = ("function", f"forward over {forward[0].base}", "goal", "backward over add(x, g, out=)")
    return f"{_heading(run[0])}\n\n{_table(columns, cells)}"


def _runs(file: str, form: Callable[[list[Row]], str]) -> Callable[[Path], list[str]]:
    """The last runs in a results file, each in a form."""

    def of(results: Path) -> list[str]:
        path = results / file
        return [form(run) for run in latest(read(path))] if path.exists() else []

    return of


def _goals(file: str, form: Callable[[list[Row]], str]) -> Callable[[Path], list[str]]:
    return _runs(file, lambda run: form(run) if any(row.goal for row in run) else "")


def trained(results: Path) -> list[str]:
    """The last run of each setting, each as a table, with the last times that were taken of it."""
    path, times_path = results / "activation_train.csv", results / "activation_train_time.csv"
    if not path.exists():
        return []
    runs: dict[tuple[object, ...], dict[str, list[Trained]]] = {}
    for row in read(path, Trained):
        if row.mode == "full":
            runs.setdefault(row.setting, {}).setdefault(row.date, []).append(row)
    times = [row for row in read(times_path) if row.mode == "full"] if times_path.exists() else []
    parts = []
    for dates in runs.values():
        rows = dates[max(dates)]
        first = rows[0]
        heading = (
            f"{first.data}, {first.train_images} training and {first.test_images} held-out images, "
            f"{first.epochs} epochs, {'with' if first.batch_norm else 'no'} batch normalization, "
            f"{len({row.seed for row in rows})} seeds; {first.machine}, {first.isa}, torch {first.torch}, "
            f"{_threads(first)}, {first.date[:10]}, commit {first.commit}:"
        )
        timed = [time for time in times if time.size == first.size and time.machine == first.machine]
        last = max((time.date for time in timed), default="")
        heads, *cells = (
            [cell for column, cell in zip(TRAINED_COLUMNS, line, strict=True) if not column.startswith("ms ")]
            for line in (TRAINED_COLUMNS, *lines(rows, [time for time in timed if time.date == last]))
        )  # only relations are quoted
        table = _table(heads, cells)
        parts.append(f"{heading}\n\n{table}")
    return parts


def _experiment(file: str, name: str) -> Callable[[Path], list[str]]:
    """The last full run of one experiment in each of its settings, a line a method."""

    def of(results: Path) -> list[str]:
        path = results / file
        found = [row for row in read(path, Measured) if row.experiment == name] if path.exists() else []
        parts = []
        for rows in grouped(found):
            first, seeds = rows[0], len({row.seed for row in rows})
            heading = (
                f"{first.setting}, {seeds} seeds; {first.machine}, {first.isa}, torch {first.torch}, {_threads(first)}, "
                f"{first.date[:10]}, commit {first.commit}:"
            )
            parts.append(f"{heading}\n\n{_table(*summary(rows))}")
        return parts

    return of


BLOCKS: dict[str, Callable[[Path], list[str]]] = {
    "hadamard": _goals("hadamard.csv", by_size),
    "activation": _goals("activation.csv", by_name),
    "activation-all": _runs("activation_all.csv", catalogue_counts),
    "activation-worst": _runs("activation_all.csv", catalogue_worst),
    "activation-train": trained,
    "grid": _goals("grid.csv", by_size),
    "linearity": _goals("linearity.csv", by_size),
    "triplet": _goals("triplet.csv", by_size),
    "mixup-patches": _experiment("mixup_train.csv", "patches"),
    "mixup-line": _experiment("mixup_train.csv", "line"),
    "mixup-digits": _experiment("mixup_train.csv", "digits"),
    "projection-weights": _experiment("projection_train.csv", "weights"),
    "projection-mismatch": _experiment("projection_train.csv", "mismatch"),
}
GOALS = ("hadamard", "activation", "grid", "linearity", "triplet")


def generate(results: Path, name: str = "") -> str:
    """The text of a block; nothing where there are no results for it.

    Raises:
        ValueError: no block has this name.
    """
    if name and name not in BLOCKS:
        raise ValueError(f"benchmark:begin {name}: no such block; there are {', '.join(BLOCKS)}")
    parts = [text for block in ([name] if name else GOALS) for text in BLOCKS[block](results) if text]
    return "\n\n".join([MADE_BY, *parts]) if parts else ""


def updated(text: str, results: Path) -> str:
    """A document with every block as the results have it.

    Raises:
        ValueError: it has no block, or one whose markers are no pair.
    """
    begins, ends, blocks = text.count("<!-- benchmark:begin"), text.count(END), len(BLOCK.findall(text))
    if not blocks or not begins == ends == blocks:
        raise ValueError(
            f"the document needs a line {BEGIN} and, after it, a line {END}, for each of its tables"
        )

    def fill(block: re.Match[str]) -> str:
        return "\n".join(filter(None, [block["begin"], generate(results, block["name"]), block["end"]]))

    return BLOCK.sub(fill, text)


def documents(root: Path) -> list[Path]:
    """README, and those pages of docs that have a block."""
    pages = [
        page for page in sorted((root / "docs").glob("*.md")) if "<!-- benchmark:begin" in page.read_text()
    ]
    return [root / "README.md", *pages]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the tables; returns 1 where the check finds one out of date."""
    parser = argparse.ArgumentParser(prog="torchlin.benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    parser.add_argument("--results", type=Path, help="folder of the results files")
    parser.add_argument("files", type=Path, nargs="*", help="files with markers (README and docs)")
    args = parser.parse_args(argv)
    results = args.results or results_folder()
    status = 0
    for page in args.files or documents(results.parents[1]):
        before = page.read_text()
        after = updated(before, results)
        if before == after:
            print(f"{page.name}: up to date")
        elif args.check:
            print(
                f"{page.name}: a table is not what {results.name} holds; run `python -m torchlin.benchmarks.report`"
            )
            status = 1
        else:
            page.write_text(after)
            print(f"{page.name}: written")
    return status


if __name__ == "__main__":
    sys.exit(main())
