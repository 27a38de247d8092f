"""The benchmarks' own tests: what they compute from times is right. No time is asserted."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from torchlin import _library
from torchlin.benchmarks import bench_hadamard, harness, report
from torchlin.benchmarks.harness import COLUMNS, Case, HostTimer, Relation, Row, Session, Value

needs_cpu_kernels = pytest.mark.skipif(not _library._CPU.loaded, reason=_library._CPU.reason)


class World:
    """A clock that only the contenders move."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def timer(self) -> HostTimer:
        return HostTimer(clock=lambda: self.now)

    def case(self, name: str, ns: Callable[[int], float], **how: object) -> Case:
        """A contender whose i-th call takes ns(i)."""
        calls = 0

        def run() -> None:
            nonlocal calls
            self.now += round(ns(calls))
            self.log.append(name)
            calls += 1

        return Case(name, run, **how)  # type: ignore[arg-type]


def row(**changes: object) -> Row:
    plain = Row(
        date="2026-01-02T03:04:05Z", commit="abc1234", machine="Some CPU", isa="avx2", torch="2.13.0",
        python="3.11.2", threads=1, timer="CPU time", mode="full", what="hot in cache", direction="forward",
        size="2^8", shape="16x256", dtype="float32", case="torchlin", alloc="in place", base="add floor",
        relation="over", value=1.0625, value_q20=1.03125, value_q80=1.09375, goal="<=1.22", unit="element",
        loops=3, repeats=31, median_ns=0.125, q20_ns=0.0625, q80_ns=0.25,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ statistics


def test_quantiles():
    assert Value.of(np.arange(11.0)) == Value(5.0, 2.0, 8.0)
    assert Value.of(np.array([3.0])) == Value(3.0, 3.0, 3.0)


def test_samples_are_what_the_clock_said():
    world = World()
    # The first call is the one that finds out about loops, and is no sample.
    samples = harness.interleave(
        [world.case("a", lambda i: 1000 * (i % 5 + 1), per=10)],
        world.timer(),
        repeats=10,
        min_sample_ns=100,
    )["a"]
    assert samples.loops == 1
    assert sorted(samples.ns) == [v for v in (100.0, 200.0, 300.0, 400.0, 500.0) for _ in range(2)]
    assert Value.of(samples.ns) == Value(300.0, 180.0, 420.0)


@pytest.mark.parametrize("ns", [1, 7, 950, 10_000])
def test_short_calls_are_repeated_until_the_sample_is_long(ns: int):
    world = World()
    case = world.case("a", lambda i: ns)
    loops = harness.loops_for(world.timer(), case.calls, at_least_ns=10_000)
    assert loops * ns >= 10_000
    assert (loops - 1) * ns < 2 * 10_000
    samples = harness.interleave([case], world.timer(), repeats=3, min_sample_ns=10_000)["a"]
    assert samples.ns.tolist() == [ns] * 3


def test_rotating_buffers_share_the_sample():
    world = World()
    calls = [world.case(name, lambda i, ns=ns: ns).calls[0] for name, ns in (("x", 100), ("y", 300))]
    samples = harness.interleave([Case("both", calls)], world.timer(), repeats=3, min_sample_ns=1000)["both"]
    assert samples.ns.tolist() == [200.0] * 3
    assert world.log == ["x", "y"] * (len(world.log) // 2)


def test_relations_are_formed_within_a_round():
    """A clock that halves its speed from round to round leaves every ratio as it is."""
    world = World()
    cases = [world.case("ours", lambda i: 3000 << i), world.case("base", lambda i: 1500 << i)]
    samples = harness.interleave(cases, world.timer(), repeats=4, min_sample_ns=1)
    assert harness.over(samples["ours"], samples["base"]) == Value(2.0, 2.0, 2.0)
    assert harness.minus_us(samples["ours"], samples["base"]) == Value.of(np.array([6.0, 12.0, 24.0, 48.0]))


def test_everybody_runs_in_every_round_and_nobody_always_first():
    world = World()
    cases = [world.case(name, lambda i: 10_000) for name in "abc"]
    harness.interleave(cases, world.timer(), repeats=6, min_sample_ns=1)
    assert "".join(world.log) == "aabbcc" + 2 * "abcbcacab"  # the first two of each are warm-up


def test_names_must_differ():
    with pytest.raises(ValueError, match=r"cases: names must differ, got \['a', 'a'\]"):
        harness.interleave([Case("a", int), Case("a", int)], World().timer())


@pytest.mark.parametrize(
    ("value", "goal", "said"),
    [
        (1.1, "<=1.10", "met"),
        (1.11, "<=1.10", "missed"),
        (8, ">=8", "met"),
        (7.9, ">=8", "missed"),
        (9, "", ""),
    ],
)
def test_verdict(value: float, goal: str, said: str):
    assert harness.verdict(value, goal) == said


def test_a_goal_is_a_limit():
    with pytest.raises(ValueError, match="expected '<=number' or '>=number', got 'fast'"):
        harness.meets(1.0, "fast")


# ------------------------------------------------------------------------------------------------------ rows


def test_the_columns_stay():
    """Results are kept for years: other columns need another file, not an edit of this text."""
    assert ",".join(COLUMNS) == (
        "date,commit,machine,isa,torch,python,threads,timer,mode,what,direction,size,shape,dtype,case,alloc,"
        "base,relation,value,value_q20,value_q80,goal,unit,loops,repeats,median_ns,q20_ns,q80_ns"
    )


def test_rows_are_only_ever_appended(tmp_path: Path):
    path = tmp_path / "made" / "hadamard.csv"
    first, second = row(), row(what='a "quoted", split\nname', value=2.5)
    harness.append(path, [first])
    before = path.read_bytes()
    harness.append(path, [second])
    assert path.read_bytes().startswith(before)
    assert path.read_text().count(COLUMNS[0]) == 1
    assert harness.read(path) == [first, second]


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path):
    path = tmp_path / "hadamard.csv"
    path.write_text("date,time\n1,2\n")
    with pytest.raises(ValueError, match=r"its columns are \['date', 'time'\], expected"):
        harness.append(path, [row()])
    with pytest.raises(ValueError, match=r"its columns are \['date', 'time'\], expected"):
        harness.read(path)
    assert path.read_text() == "date,time\n1,2\n"


def test_a_session_writes_what_it_measured(tmp_path: Path):
    world = World()
    session = Session("family", tmp_path, timer=world.timer(), partial=True)
    session.compare(
        "what",
        [world.case("ours", lambda i: 300_000, alloc="out="), world.case("copy", lambda i: 200_000, per=2)],
        [Relation("ours", "copy", "<=2"), Relation("copy", "ours", kind="minus", title="a copy")],
        size="2^3",
        shape=(4, 8),
        dtype=torch.bfloat16,
        direction="both",
    )
    ours, copied = harness.read(tmp_path / "family.csv")
    assert (ours.case, ours.base, ours.value, ours.goal, ours.median_ns) == (
        "ours",
        "copy",
        3.0,
        "<=2",
        300_000,
    )
    assert (copied.case, copied.relation, copied.value, copied.median_ns) == (
        "a copy",
        "minus",
        -200.0,
        100_000,
    )
    assert (ours.shape, ours.dtype, ours.direction, ours.alloc, ours.mode) == (
        "4x8",
        "bfloat16",
        "both",
        "out=",
        "partial",
    )
    assert harness.verdict(ours.value, ours.goal) == "missed"
    assert ours.machine
    assert ours.commit
    assert ours.torch == torch.__version__
    assert len(harness.line(ours)) == len(harness.TABLE_COLUMNS)


def test_a_contender_that_computes_something_else_is_not_timed(tmp_path: Path):
    session = Session("family", tmp_path, timer=World().timer())
    x = torch.randn(64)

    def run() -> None:
        raise AssertionError("timed")

    with pytest.raises(RuntimeError, match="twice is not the function it is compared as"):
        session.compare(
            "what",
            [Case("same", run, result=lambda: x.clone()), Case("twice", run, result=lambda: 2 * x)],
            [],
            size="",
            shape=x.shape,
            dtype=x.dtype,
            expected=x.double(),
        )
    assert not (tmp_path / "family.csv").exists()


# ---------------------------------------------------------------------------------------------------- report

RUN = [
    row(),
    row(size="2^9", value=1.5, goal="<=1.10"),
    row(size="2^10", value=1.0, goal="<=1.10"),
    row(size="2^11", value=1.098, goal="<=1.10"),
    row(
        what="one call", size="16", alloc="fresh", base="nothing", relation="minus", value=2.25, goal="<=2.6"
    ),
    row(what="no goal", goal=""),
]
TABLE = """\
<!-- written by `python -m torchlin.benchmarks.report` from benchmarks/results -->

Some CPU, avx2, torch 2.13.0, 1 thread, CPU time, 2026-01-02, commit abc1234:

| what | n | dtype | timed (allocation) | over | goal | measured | |
|---|---|---|---|---|---|---|---|
| hot in cache | 2^8 | float32 | torchlin (in place) | add floor | ≤ 1.22 | 1.06 | met |
| hot in cache | 2^9 … 2^11 | float32 | torchlin (in place) | add floor | ≤ 1.10 | 1 … 1.5 | missed at 2^9 |
| one call | 16 | float32 | torchlin (fresh) | minus nothing | ≤ 2.6 µs | 2.25 µs | met |"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    harness.append(tmp_path / "results" / "hadamard.csv", [row(date="2025-12-31T00:00:00Z", value=7.0), *RUN])
    (tmp_path / "README.md").write_text(f"# before\n\n{report.BEGIN}\n{report.END}\n\nafter\n")
    return tmp_path


def run_report(checkout: Path, *more: str) -> int:
    return report.main(["--results", str(checkout / "results"), str(checkout / "README.md"), *more])


def test_the_table_is_the_last_full_run_of_each_machine(checkout: Path):
    later = "2027-01-01T00:00:00Z"
    not_full = [row(date=later, mode="quick", value=9.0), row(date=later, mode="partial", value=9.0)]
    harness.append(checkout / "results" / "hadamard.csv", not_full)
    assert report.generate(checkout / "results") == TABLE
    harness.append(checkout / "results" / "hadamard.csv", [row(machine="Other", threads=2, value=1.2)])
    assert report.generate(checkout / "results").startswith(
        TABLE + "\n\nOther, avx2, torch 2.13.0, 2 threads"
    )


def test_check_sees_drift_and_writing_mends_it(checkout: Path, capsys: pytest.CaptureFixture[str]):
    readme = checkout / "README.md"
    before = readme.read_text()
    assert run_report(checkout, "--check") == 1
    assert "run `python -m torchlin.benchmarks.report`" in capsys.readouterr().out
    assert readme.read_text() == before
    assert run_report(checkout) == 0
    assert readme.read_text() == f"# before\n\n{report.BEGIN}\n{TABLE}\n{report.END}\n\nafter\n"
    assert run_report(checkout, "--check") == 0
    harness.append(
        checkout / "results" / "hadamard.csv", [dataclasses.replace(RUN[0], date="2026-06-01T00:00:00Z")]
    )
    assert run_report(checkout, "--check") == 1
    readme.write_text(readme.read_text().replace("1.06", "1.01"))
    assert run_report(checkout, "--check") == 1


def test_no_results_leave_no_table(tmp_path: Path):
    empty = f"{report.BEGIN}\n{report.END}"
    assert report.updated(empty, tmp_path) == empty


def test_markers_are_needed():
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.updated("# a readme", Path())
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.updated(f"{report.END}\n{report.BEGIN}", Path())


def test_this_readme_shows_these_results():
    if harness.results_folder().name != "results":
        pytest.skip("torchlin is not installed from a checkout")
    assert report.main(["--check"]) == 0


# ------------------------------------------------------------------------------------------- the ops it times


@needs_cpu_kernels
def test_ceilings_do_what_they_are_timed_for():
    raw = torch.ops.torchlin
    assert raw._bench_cycles(1024) == 1024
    before = raw._cpu_isa()
    try:
        for level in raw._cpu_isa_names().split(","):
            raw._set_cpu_isa(level)
            lanes = {"baseline": 4, "avx2": 8, "avx512": 16}[level]
            for operation in ("add", "fma"):  # 12 chains that start at 0 ... 11, each 5 steps of + 1
                assert raw._bench_arithmetic(5 * 12 * lanes, operation) == sum(range(12)) + 12 * 5
    finally:
        raw._set_cpu_isa(before)
    with pytest.raises(RuntimeError, match="operation must be add or fma"):
        raw._bench_arithmetic(1, "mul")
    source, target = torch.randn(2, 100)
    raw._bench_copy(target, source, 2)
    assert torch.equal(source, target)
    with pytest.raises(RuntimeError, match="same size"):
        raw._bench_copy(target, source[:50], 1)
    with pytest.raises(RuntimeError, match="contiguous"):
        raw._bench_copy(target[::2], source[::2], 1)


@needs_cpu_kernels
@pytest.mark.parametrize("n", [16, 256, 576, 1 << 14])
def test_rows_of_stride_zero_are_transformed_over_and_over(n: int):
    """What the hot rows rest on: each index of the expanded dimension is one transform of the same memory."""
    work = torch.randn(3, n)
    four = work.clone()
    norm = work.norm()
    bench_hadamard.raw_inplace(work.expand(4, 3, n))()
    for _ in range(4):
        bench_hadamard.raw_inplace(four)()
    if n & (n - 1) == 0:
        assert torch.equal(work, four)
    else:  # rows are taken several at a time, and here they are one: as much work, fewer powers of H
        torch.testing.assert_close(work.norm(), norm)


@needs_cpu_kernels
def test_hadamard_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    checked: list[str] = []
    compare = Session.compare

    def spy(self: Session, what: str, cases: list[Case], *rest: object, **how: object) -> object:
        if how.get("expected") is not None and any(case.result is not None for case in cases):
            checked.append(what)
        return compare(self, what, cases, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "compare", spy)
    threads = torch.get_num_threads()
    assert bench_hadamard.main(["--quick", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    rows = harness.read(tmp_path / "hadamard.csv")
    assert {row.mode for row in rows} == {"quick"}
    assert all(math.isfinite(row.value) and row.median_ns > 0 for row in rows)
    # Each thing that is timed was held against the reference first; the ceilings compute nothing.
    assert {row.what for row in rows} - set(checked) == {
        row.what for row in rows if row.what.startswith("ceilings")
    }
    goals = {row.what for row in rows if row.goal}
    for what in ("hot", "streaming", "plain torch", "composite order", "16-bit", "one call"):
        assert any(goal.startswith(what) for goal in goals), f"{what}: no row with a goal"
    out = capsys.readouterr().out
    assert str(tmp_path / "hadamard.csv") in out
    assert "add floor" in out


def test_a_graph_holds_every_turn_and_is_captured_once(monkeypatch: pytest.MonkeyPatch):
    """CudaTimer with a stand-in for the device: capturing runs the calls, replaying does not."""
    log: list[str] = []
    replays: list[int] = []

    class Graph:
        def replay(self) -> None:
            replays.append(1)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(replays)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 0.25 * (end.at - self.at)  # ms

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    for name, fake in {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    timer = harness.CudaTimer()
    calls = [lambda: log.append("x"), lambda: log.append("y")]
    assert timer.sample(calls, 3) == 0.25e6
    assert log == ["x", "y"] * (1 + 3)  # once outside the capture, then every turn inside
    assert timer.sample(calls, 3) == 0.25e6
    assert len(log) == 8
    assert len(replays) == 2
    timer.forget()
    timer.sample(calls, 1)
    assert len(log) == 12


@needs_cpu_kernels
def test_gpu_rows_compare_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Everything about them but the device: CPU tensors, a GPU with an L2 of 256 KiB."""
    randn = bench_hadamard.randn
    monkeypatch.setattr(bench_hadamard, "randn", lambda *shape, dtype, device: randn(*shape, dtype=dtype))
    properties = types.SimpleNamespace(L2_cache_size=1 << 18)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    session = Session("hadamard", tmp_path, quick=True)
    bench_hadamard.gpu_rows(session, [5, 13, 14], quick=True)
    ours = [row for row in session.rows if row.case == "torchlin"]
    assert len(ours) == 2 * 3 * 3
    assert {row.base for row in ours} == {"torch.clone"}
    assert {(row.size, row.goal) for row in ours} == {("2^5", "<=1.05"), ("2^13", "<=1.05"), ("2^14", "")}
    assert {row.what for row in ours} == {"GPU, L2-resident", "GPU, DRAM-bound"}


@needs_cpu_kernels
def test_unknown_sections_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_hadamard.main(["--quick", "--only", "hot,warm", "--out", str(tmp_path)])
    assert "no section warm; there are machine, hot" in capsys.readouterr().err


def test_a_device_without_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(_library, "_KERNELS", set())
    monkeypatch.setattr(_library, "_warned", set())
    with pytest.warns(RuntimeWarning, match="not available"):
        assert bench_hadamard.main(["--device", "cpu"]) == 1
    assert "no cpu kernels to measure" in capsys.readouterr().err
