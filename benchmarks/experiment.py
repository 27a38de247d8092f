"""What the experiments on methods share: one line a measured quantity, and tables of means over seeds."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from torchlin._console import progress, table
from torchlin.benchmarks.harness import Session, append


@dataclass(frozen=True)
class Measured:
    """One line of `results/<family>_train.csv`: one quantity of one method, trained once."""

    date: str
    commit: str
    machine: str
    isa: str
    torch: str
    python: str
    threads: int
    mode: str
    experiment: str
    setting: str  # what is the same for all methods
    method: str
    seed: int
    quantity: str
    value: float


@dataclass(frozen=True)
class Experiment:
    """Methods, and what to do with one and a seed: it returns {quantity: value}."""

    name: str
    setting: str
    methods: Sequence[str]
    run: Callable[[str, int], Mapping[str, float]]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds (of a sample), with as many digits as tell something."""
    mean = statistics.fmean(values)
    digits = 1 if abs(mean) >= 20 else 2 if abs(mean) >= 1 else 3
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{deviation}"


def summary(rows: Iterable[Measured]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table of one experiment: a line a method, a column a quantity."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row.method, {}).setdefault(row.quantity, []).append(row.value)
    quantities = list(dict.fromkeys(quantity for values in found.values() for quantity in values))
    lines = [
        [method, *(mean_and_deviation(values[q]) if q in values else "" for q in quantities)]
        for method, values in found.items()
    ]
    return ["method", *quantities], lines


def grouped(rows: Iterable[Measured]) -> Iterator[list[Measured]]:
    """The last full run of each experiment in each setting."""
    runs: dict[tuple[str, str], dict[str, list[Measured]]] = {}
    for row in rows:
        if row.mode == "full":
            runs.setdefault((row.experiment, row.setting), {}).setdefault(row.date, []).append(row)
    for dates in runs.values():
        yield dates[max(dates)]


def parser(module: str, about: str, names: Sequence[str], seeds: int) -> argparse.ArgumentParser:
    """The options that every program of experiments has."""
    found = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    found.add_argument("--only", choices=names, help="one of the experiments")
    found.add_argument("--seeds", type=int, default=seeds, help=f"runs of each method ({seeds})")
    found.add_argument("--threads", type=int, default=1, help="(1)")
    found.add_argument("--quick", action="store_true", help="one seed, next to no training: does it run")
    found.add_argument("--out", type=Path, help="folder of the results and plots")
    return found


def run(
    family: str,
    experiments: Sequence[Experiment],
    args: argparse.Namespace,
    plots: Mapping[str, Callable[[Sequence[Measured], Path], Any]],
) -> int:
    """Runs them, prints their tables, appends the rows, draws the plots; returns the process's exit status."""
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        session = Session(f"{family}_train", args.out, args.quick, args.threads)
        of_session: dict[str, Any] = {
            f.name: session.constants[f.name] for f in fields(Measured) if f.name in session.constants
        }
        for experiment in experiments:
            rows: list[Measured] = []
            constant = {**of_session, "experiment": experiment.name, "setting": experiment.setting}
            seeds = 1 if args.quick else args.seeds
            with progress(len(experiment.methods) * seeds, experiment.name) as bar:
                for method in experiment.methods:
                    for seed in range(seeds):
                        for quantity, value in experiment.run(method, seed).items():
                            what: dict[str, Any] = {"method": method, "seed": seed, "quantity": quantity}
                            rows.append(Measured(**constant, **what, value=float(value)))
                        bar.advance(description=f"{experiment.name}: {method}, seed {seed}")
            append(session.file, rows, Measured)
            columns, lines = summary(rows)
            table(f"{experiment.name}: {experiment.setting}", columns, lines)
            if experiment.name in plots:
                picture = session.file.with_name(f"{family}_{experiment.name}.png")
                try:
                    plots[experiment.name](rows, picture)
                    print(f"plot: {picture}")
                except ModuleNotFoundError:
                    print("no plot: pip install matplotlib", file=sys.stderr)
        print(f"rows appended to {session.file}")
    finally:
        torch.set_num_threads(threads)
    return 0
