"""One harness for all families: contenders run in turn in one process, and only their relations are quoted.

A contender's sample and that of what it is compared with come from the same round, milliseconds apart, and a
relation is the median of paired values: drifts of clock and load fall out. Ratios across runs are
never formed.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from torchlin.benchmarks.machine import describe

MIN_SAMPLE_NS = 1e6  # next to which a reading of the clock (0.25 us) and the change of contender are nothing
REPEATS, QUICK_REPEATS = 31, 2
FEWEST_REPEATS = 5
BUDGET_S = 4.0  # of one comparison: slow contenders get fewer rounds, never less than FEWEST_REPEATS

# Relative L2 error up to which a contender computes the same function; its accuracy is the tests' business.
SAME = {torch.float64: 1e-12, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


# --------------------------------------------------------------------------------------------------- clocks


class Timer(Protocol):
    """Anything that can time `loops` calls; `label` says what it counts."""

    label: str

    def sample(self, run: Sequence[Callable[[], object]], loops: int) -> float:
        """Nanoseconds of `loops` turns through `run`."""
        ...


class HostTimer:
    """CPU time of the one thread, or wall time where several work: there, CPU time would hide the waiting."""

    def __init__(self, threads: int = 1, clock: Callable[[], int] | None = None) -> None:
        self._clock = clock or (time.thread_time_ns if threads == 1 else time.perf_counter_ns)
        self.label = "CPU time" if threads == 1 else "wall time"

    def sample(self, run: Sequence[Callable[[], object]], loops: int) -> float:
        if len(run) == 1:  # no inner loop: its 50 ns would be a tenth of the shortest calls
            call = run[0]
            start = self._clock()
            for _ in range(loops):
                call()
            return self._clock() - start
        start = self._clock()
        for _ in range(loops):
            for call in run:
                call()
        return self._clock() - start


class CudaTimer:
    """CUDA events around a graph of the calls: launches from Python cost nothing, short kernels show."""

    label = "CUDA events"

    def __init__(self) -> None:
        # One stream for all, and not the default one, which cannot be captured: a backward pass runs on the
        # stream that its forward ran on.
        self.stream = torch.cuda.Stream()
        self._graphs: dict[tuple[int, int], tuple[Any, torch.cuda.CUDAGraph]] = {}

    def _graph(self, run: Sequence[Callable[[], object]], loops: int) -> torch.cuda.CUDAGraph:
        key = (id(run), loops)
        if key not in self._graphs:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # lazy initialisation must not happen inside the capture
                for call in run:
                    call()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(loops):
                    for call in run:
                        call()
            self._graphs[key] = (run, graph)  # holds `run`, so that its id stays its own
        return self._graphs[key][1]

    def sample(self, run: Sequence[Callable[[], object]], loops: int) -> float:
        graph = self._graph(run, loops)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e6

    def forget(self) -> None:
        """Frees the graphs and what they hold."""
        self._graphs.clear()


# ---------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Case:
    """A contender: what to call, how much one call does, and where its output goes.

    `run` may be a list of calls taken in turn (rotating buffers, which defeat a cache). `per` is the number
    of units of work in a call, so that contenders with different batches compare. `result` returns its output
    on the comparison's input; it is held against `expected` before anything is timed.
    """

    name: str
    run: Callable[[], object] | Sequence[Callable[[], object]]
    per: float = 1.0
    alloc: str = "fresh"
    result: Callable[[], torch.Tensor] | None = None

    @property
    def calls(self) -> Sequence[Callable[[], object]]:
        return [self.run] if callable(self.run) else self.run


@dataclass(frozen=True)
class Samples:
    """Nanoseconds per unit of one contender, one value a round."""

    ns: np.ndarray
    loops: int

    @property
    def median(self) -> float:
        return float(np.median(self.ns))


@dataclass(frozen=True)
class Value:
    """Median and 20/80 quantiles."""

    median: float
    q20: float
    q80: float

    @staticmethod
    def of(values: np.ndarray) -> Value:
        q20, median, q80 = np.quantile(values, [0.2, 0.5, 0.8])
        return Value(float(median), float(q20), float(q80))


def loops_for(timer: Timer, calls: Sequence[Callable[[], object]], at_least_ns: float = MIN_SAMPLE_NS) -> int:
    """How many turns make a sample long enough; finding out warms the contender up too."""
    loops = 1
    timer.sample(calls, 1)  # pages, caches and lazy initialisation: a first call says nothing about the next
    while (ns := timer.sample(calls, loops)) < at_least_ns:
        loops = max(loops + 1, min(10 * loops, int(np.ceil(1.2 * loops * at_least_ns / max(ns, 1.0)))))
    return loops


def interleave(
    cases: Sequence[Case],
    timer: Timer,
    *,
    repeats: int = REPEATS,
    budget_s: float = BUDGET_S,
    min_sample_ns: float = MIN_SAMPLE_NS,
) -> dict[str, Samples]:
    """Times the cases in turn, round after round, and returns their samples by name.

    The order is rotated from round to round: nobody always runs in the caches that the same neighbour left.
    """
    if len({case.name for case in cases}) != len(cases):
        raise ValueError(f"cases: names must differ, got {[case.name for case in cases]}")
    collecting = gc.isenabled()
    gc.disable()
    try:
        calls = {case.name: case.calls for case in cases}  # one list a case: CudaTimer knows its graphs by it
        loops = {name: loops_for(timer, run, min_sample_ns) for name, run in calls.items()}
        ns: dict[str, list[float]] = {case.name: [] for case in cases}
        begun = time.monotonic()
        for turn in range(repeats):
            if turn >= FEWEST_REPEATS and time.monotonic() - begun > budget_s:
                break
            for case in (*cases[turn % len(cases) :], *cases[: turn % len(cases)]):
                run = calls[case.name]
                if loops[case.name] > 1:
                    # Untimed: the neighbour has left its data in the caches, and wide vector units take
                    # some microseconds to wake. A call as long as a sample does not notice.
                    timer.sample(run, 1)
                took = timer.sample(run, loops[case.name])
                ns[case.name].append(took / (loops[case.name] * len(run) * case.per))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(np.array(values), loops[name]) for name, values in ns.items()}


def over(case: Samples, base: Samples) -> Value:
    """case's time over base's, round by round."""
    return Value.of(case.ns / base.ns)


def minus_us(case: Samples, base: Samples) -> Value:
    """case's time less base's in microseconds, round by round."""
    return Value.of((case.ns - base.ns) * 1e-3)


RELATIONS = {"over": over, "minus": minus_us}


class WrongResult(RuntimeError):
    """A contender that is no rival: it computes something else."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of `expected`; the norm itself where zeros are expected."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / (expected.norm() or 1.0))


# ----------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One line of `results/<family>.csv`; the fields are its columns, in this order, for good.

    `value` is case's time over base's, or less base's in microseconds (`relation`); times are per `unit`.
    """

    date: str
    commit: str
    machine: str
    isa: str
    torch: str
    python: str
    threads: int
    timer: str
    mode: str
    what: str
    direction: str
    size: str
    shape: str
    dtype: str
    case: str
    alloc: str
    base: str
    relation: str
    value: float
    value_q20: float
    value_q80: float
    goal: str
    unit: str
    loops: int
    repeats: int
    median_ns: float
    q20_ns: float
    q80_ns: float


def columns(kind: type) -> list[str]:
    """The heading of a file of such rows: the fields of their dataclass."""
    return [column.name for column in dataclasses.fields(kind)]


COLUMNS = columns(Row)


def meets(value: float, goal: str) -> bool | None:
    """Whether a value meets a goal such as "<=1.10" or ">=8"; None where there is no goal."""
    if not goal:
        return None
    if goal[:2] not in ("<=", ">="):
        raise ValueError(f"goal: expected '<=number' or '>=number', got {goal!r}")
    limit = float(goal[2:])
    return value <= limit if goal[:2] == "<=" else value >= limit


def verdict(value: float, goal: str) -> str:
    """met, missed, or nothing where there is no goal."""
    return {None: "", True: "met", False: "missed"}[meets(value, goal)]


def results_folder() -> Path:
    """`benchmarks/results` of a checkout; `./torchlin-bench` where torchlin is installed from a wheel."""
    here = Path(__file__).resolve().parent
    in_checkout = here.name == "benchmarks" and (here.parent / "pyproject.toml").exists()
    return here / "results" if in_checkout else Path.cwd() / "torchlin-bench"


def append(path: Path, rows: Iterable[Any], kind: type = Row) -> None:
    """Adds rows, all of one dataclass, to a CSV file, which is made with its heading if there is none.

    Raises:
        ValueError: the file has other columns; nothing is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size == 0:
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(columns(kind))
    else:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != columns(kind):
            raise ValueError(
                f"{path}: its columns are {found}, expected {columns(kind)}; move the file away first"
            )
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in rows:
            values = dataclasses.astuple(row)
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])


def read(path: Path, kind: Callable[..., Any] = Row) -> list[Any]:
    """The rows of a results file; `kind` is their dataclass."""
    made_of: Mapping[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    convert = {column.name: made_of[str(column.type)] for column in dataclasses.fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(convert):
            raise ValueError(f"{path}: its columns are {reader.fieldnames}, expected {list(convert)}")
        return [kind(**{name: convert[name](text) for name, text in line.items()}) for line in reader]


# ------------------------------------------------------------------------------------------------ a session


@dataclass(frozen=True)
class Relation:
    """A line of the answer: `case` over (or minus) `base`, with the goal it is held to."""

    case: str
    base: str
    goal: str = ""
    kind: str = "over"
    title: str = ""  # what to call the case in the row, if not by its name


@dataclass
class Session:
    """One run of a family's benchmark: times comparisons, keeps their rows, appends them to the file."""

    family: str
    out: Path | None = None
    quick: bool = False
    threads: int = 1
    device: str = "cpu"
    partial: bool = False  # not every section: such a run's rows are kept, but reported nowhere
    timer: Timer | None = None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.timer is None:
            self.timer = CudaTimer() if self.device == "cuda" else HostTimer(self.threads)
        self.file = (self.out or results_folder()) / f"{self.family}.csv"
        now = datetime.datetime.now(datetime.timezone.utc)
        self.constants: dict[str, Any] = {
            **describe(self.device),
            "date": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "threads": self.threads,
            "timer": self.timer.label,
            "mode": "quick" if self.quick else "partial" if self.partial else "full",
        }

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """Where the contenders must be made and run: on a GPU, the stream that is captured."""
        if isinstance(self.timer, CudaTimer):
            return torch.cuda.stream(self.timer.stream)
        return contextlib.nullcontext()

    @property
    def heading(self) -> str:
        """What was measured on, in one line."""
        c = self.constants
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{c['machine']}, {c['isa']}, torch {c['torch']}, {threads}, {c['timer']}"

    def compare(
        self,
        what: str,
        cases: Sequence[Case],
        relations: Sequence[Relation] | Callable[[dict[str, Samples]], Sequence[Relation]],
        *,
        size: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        direction: str = "forward",
        unit: str = "call",
        expected: torch.Tensor | None = None,
        repeats: int | None = None,
    ) -> dict[str, Samples]:
        """Checks the cases against `expected`, times them interleaved, and appends one row a relation.

        `relations` may be a function of the samples, where the times decide what is compared ("the best of").

        Raises:
            WrongResult: a case computes something else than `expected`; nothing is timed then.
        """
        assert self.timer is not None
        if expected is not None:
            for case in (case for case in cases if case.result is not None):
                error = relative_error(case.result(), expected)  # type: ignore[misc]
                if not error <= SAME[dtype]:
                    raise WrongResult(
                        f"{what}, {size}: {case.name} is not the function it is compared as "
                        f"(relative error {error:.2g}, at most {SAME[dtype]:.0e} allowed)"
                    )
        samples = interleave(
            cases,
            self.timer,
            repeats=repeats or (QUICK_REPEATS if self.quick else REPEATS),
            budget_s=BUDGET_S,
            min_sample_ns=MIN_SAMPLE_NS / 10 if self.quick else MIN_SAMPLE_NS,
        )
        if isinstance(self.timer, CudaTimer):
            self.timer.forget()
        alloc = {case.name: case.alloc for case in cases}
        fresh = []
        for relation in relations(samples) if callable(relations) else relations:
            of, base = samples[relation.case], samples[relation.base]
            value, own = RELATIONS[relation.kind](of, base), Value.of(of.ns)
            fresh.append(
                Row(
                    **self.constants,
                    what=what,
                    direction=direction,
                    size=size,
                    shape="x".join(map(str, shape)),
                    dtype=str(dtype).removeprefix("torch."),
                    case=relation.title or relation.case,
                    alloc=alloc[relation.case],
                    base=relation.base,
                    relation=relation.kind,
                    value=value.median,
                    value_q20=value.q20,
                    value_q80=value.q80,
                    goal=relation.goal,
                    unit=unit,
                    loops=of.loops,
                    repeats=len(of.ns),
                    median_ns=own.median,
                    q20_ns=own.q20,
                    q80_ns=own.q80,
                )
            )
        append(self.file, fresh)
        self.rows += fresh
        return samples


# ---------------------------------------------------------------------------------------------- the printout

TABLE_COLUMNS = ("what", "size", "dtype", "timed", "allocation", "over", "measured", "20-80 %", "goal", "")


def figure(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line(row: Row) -> list[str]:
    """A row as a person reads it, under `TABLE_COLUMNS`."""
    base = row.base if row.relation == "over" else f"minus {row.base}, us"
    what = row.what if row.direction == "forward" else f"{row.what} ({row.direction})"
    span = f"{figure(row.value_q20)} - {figure(row.value_q80)}"
    goal = row.goal.replace("<=", "≤ ").replace(">=", "≥ ")
    short = row.dtype.replace("bfloat", "bf").replace("float", "fp")
    return [
        what,
        row.size,
        short,
        row.case,
        row.alloc,
        base,
        figure(row.value),
        span,
        goal,
        verdict(row.value, row.goal),
    ]
