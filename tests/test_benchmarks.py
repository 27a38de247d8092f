"""The benchmarks' own tests: what they compute from times is right. No time is asserted."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from torchlin import _library
from torchlin.benchmarks import (
    activation_rivals,
    bench_activation,
    bench_hadamard,
    harness,
    image_data,
    report,
    train_activation,
)
from torchlin.benchmarks.harness import COLUMNS, Case, HostTimer, Relation, Row, Session, Value
from torchlin.ops.activation import activation_reference

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
        "graph": lambda graph, stream: contextlib.nullcontext(),
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


# -------------------------------------------------------------------------------------------------- activations


def test_a_cheap_function_takes_one_exponential():
    cheap = {"relu", "leaky_relu", "hardswish", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "elu", "mish"}
    dear = {"softplus", "tanhexp", "logish", "serf", "gcu", "pau"}
    assert {name for name in cheap | dear if bench_activation.is_cheap(name)} == cheap


@pytest.mark.parametrize(
    ("threads", "device", "name", "dtype", "direction", "limit"),
    [
        (2, "cpu", "mish", torch.float32, "forward", "<=1.3"),
        (2, "cpu", "serf", torch.float32, "forward", "<=2"),
        (2, "cpu", "gelu", torch.bfloat16, "forward", "<=1.5"),
        (2, "cpu", "serf", torch.bfloat16, "forward", ""),
        (2, "cpu", "silu", torch.float32, "backward", "<=1.5"),
        (1, "cpu", "silu", torch.float32, "forward", ""),
        (1, "cuda", "serf", torch.float32, "forward", "<=1.053"),
        (1, "cuda", "serf", torch.float32, "backward", "<=1.111"),
    ],
)
def test_goals_of_what_streams(threads, device, name, dtype, direction, limit):
    session = types.SimpleNamespace(threads=threads, device=device)
    assert bench_activation.goal(session, name, dtype, direction) == limit


@pytest.mark.parametrize("name", [*activation_rivals.OWN, *activation_rivals.COMPOSITES])
def test_rivals_are_the_functions_of_their_names(name: str):
    x = 2 * torch.randn(1000, dtype=torch.float64)
    expected = activation_reference(x, name)
    torch.testing.assert_close(bench_activation.plain(name)(x), expected, rtol=1e-7, atol=1e-8)
    if name in activation_rivals.OWN:
        out = torch.empty_like(x)
        activation_rivals.OWN[name][1](x, out)
        torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-8)


def test_every_name_of_one_tensor_is_swept():
    names = bench_activation.scalar_names()
    assert len(set(names)) == len(names) >= 400
    assert {"relu", "pau", "rrelu", "serf"} <= set(names)
    assert not {"swiglu", "maxout", "softmax"} & set(names)


KEPT_HEAP = """
import resource, torch
from torchlin.benchmarks import heap

def faults(size=1 << 26):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.full((size,), 1, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with heap.kept(1 << 28) as kept:
    print("kept" if kept else "no glibc", max(faults() for _ in range(5)))
print(faults())
"""


def test_a_kept_heap_has_no_page_faults():
    """In a process of its own: what others left in the heap decides where a large block goes."""
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", KEPT_HEAP], capture_output=True, text=True, check=True)
    kept, inside, afterwards = run.stdout.rsplit(maxsplit=2)
    if kept != "kept":
        pytest.skip("this C library is not glibc")
    assert int(inside) < 16
    assert int(afterwards) > 16, "and afterwards it is as it was"


@needs_cpu_kernels
def test_activation_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checked: set[str] = set()
    compare = Session.compare

    def spy(self: Session, what: str, cases: list[Case], *rest: object, **how: object) -> object:
        # Every contender but the floors computes the function, and is held against it.
        if how.get("expected") is not None and all(
            (case.result is None) == (case.name in FLOORS) for case in cases
        ):
            checked.add(what)
        return compare(self, what, cases, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "compare", spy)
    monkeypatch.setattr(activation_rivals, "PEERS", {"torch": {"mish": lambda: torch.nn.functional.mish}})
    threads = torch.get_num_threads()
    assert bench_activation.main(["--quick", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    rows = harness.read(tmp_path / "activation.csv")
    assert {row.mode for row in rows} == {"quick"}
    assert {row.threads for row in rows} == {1, 2}
    assert {row.what for row in rows} == checked
    assert all(math.isfinite(row.value) and row.median_ns > 0 for row in rows)
    goals = {(row.direction, row.dtype, row.base, row.goal) for row in rows if row.goal}
    assert goals == {
        ("forward", "float32", "nothing", "<=2.6"),
        ("forward", "float32", "torchlin", ">=1"),
        ("forward", "float32", "torchlin", ">=5"),
        ("forward", "float32", "copy_", "<=1.3"),
        ("forward", "float32", "copy_", "<=2"),
        ("forward", "bfloat16", "copy_", "<=1.5"),
    }
    assert {"swiglu, halves", "swiglu, interleaved", "prelu, per channel"} <= checked
    assert str(tmp_path / "activation.csv") in capsys.readouterr().out


FLOORS = {"nothing", "copy_", "clone", "add(x, g, out=)", "mul(a, b, out=)"}


@needs_cpu_kernels
def test_the_catalogue_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench_activation, "scalar_names", lambda: ["relu", "pau", "swish_beta", "rrelu"] * 2)
    assert bench_activation.main(["--all", "--quick", "--out", str(tmp_path)]) == 0
    rows = harness.read(tmp_path / "activation_all.csv")
    directions = {name: {row.direction for row in rows if row.what == name} for name in ("relu", "pau")}
    assert directions["relu"] == {"forward", "backward"}
    assert directions["pau"] == {"forward", "backward", "backward, parameters too"}
    assert {row.base for row in rows} == {"copy_", "add(x, g, out=)"}
    assert "the worst 30" in capsys.readouterr().out


def activation_rows() -> list[Row]:
    plain = row(size="16M", alloc="out=", base="copy_", case="torchlin", threads=2, timer="wall time")
    return [
        dataclasses.replace(plain, what=name, direction=direction, base=base, value=value, goal=goal)
        for name, direction, base, value, goal in (
            ("relu", "forward", "copy_", 1.0, "<=1.3"),
            ("gelu", "forward", "copy_", 1.4, "<=1.3"),
            ("mish", "forward", "copy_", 1.2, "<=1.3"),
            ("serf", "forward", "copy_", 1.875, "<=2"),
            ("relu", "backward", "add(x, g, out=)", 1.0, "<=1.5"),
            ("serf", "backward", "add(x, g, out=)", 3.0, ""),
        )
    ]


def test_functions_under_one_goal_share_a_line():
    assert report.by_name(activation_rows()).splitlines()[2:] == [
        "| | functions | n | dtype | timed (allocation) | over | goal | measured | |",
        "|---|---|---|---|---|---|---|---|---|",
        "| forward | relu, gelu, mish | 16M | float32 | torchlin (out=) | copy_ | ≤ 1.3 "
        "| 1 (relu) … 1.4 (gelu) | missed: gelu |",
        "| forward | serf | 16M | float32 | torchlin (out=) | copy_ | ≤ 2 | 1.88 (serf) | met |",
        "| backward | relu | 16M | float32 | torchlin (out=) | add(x, g, out=) | ≤ 1.5 | 1 (relu) | met |",
    ]


def test_the_catalogue_is_counted_and_its_worst_are_named():
    counts = report.catalogue_counts(activation_rows()).splitlines()[4:]
    assert counts == [
        "| forward | copy_ | | 4 | | 1 | 2 | 3 | 4 | 1.4 | 1.88 (serf) |",
        "| forward | copy_ | ≤ 1.3 | 3 | 2 | 1 | 2 | 3 | 3 | 1.2 | 1.4 (gelu) |",
        "| forward | copy_ | ≤ 2 | 1 | 1 | 0 | 0 | 0 | 1 | 1.88 | 1.88 (serf) |",
        "| backward | add(x, g, out=) | | 2 | | 1 | 1 | 1 | 1 | 3 | 3 (serf) |",
        "| backward | add(x, g, out=) | ≤ 1.5 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 (relu) |",
    ]
    worst = report.catalogue_worst(activation_rows()).splitlines()[4:]
    assert worst[0] == "| serf | 1.88 | ≤ 2 | 3 |"
    assert [line.split()[1] for line in worst] == ["serf", "gelu", "mish", "relu"]


def test_each_page_gets_the_tables_it_asks_for(checkout: Path):
    harness.append(checkout / "results" / "activation.csv", activation_rows())
    page = checkout / "page.md"
    block = "<!-- benchmark:begin {} -->\n<!-- benchmark:end -->\n"
    page.write_text(f"one\n{block.format('activation')}two\n{block.format('activation-all')}three\n")
    arguments = ["--results", str(checkout / "results"), str(page)]
    assert report.main(["--check", *arguments]) == 1
    assert report.main(arguments) == 0
    text = page.read_text()
    assert report.by_name(activation_rows()) in text
    assert "hot in cache" not in text
    assert text.endswith(f"two\n{block.format('activation-all')}three\n")  # there are no rows for it
    assert report.main(["--check", *arguments]) == 0
    assert run_report(checkout) == 0
    both = (checkout / "README.md").read_text()
    assert "hot in cache" in both
    assert "missed: gelu" in both
    with pytest.raises(ValueError, match="no such block; there are hadamard, activation"):
        report.updated(block.format("speed"), checkout / "results")


# ----------------------------------------------------------------------------------------- training the eighteen


@pytest.fixture(scope="module")
def digits() -> image_data.Images:
    pytest.importorskip("sklearn")
    return image_data.load("digits")


def test_a_third_of_each_class_is_held_out(digits: image_data.Images):
    assert (len(digits.train), len(digits.test), digits.classes) == (1198, 599, 10)
    assert digits.train.shape[1:] == (1, 8, 8)
    shares = digits.test_labels.bincount() / (digits.test_labels.bincount() + digits.train_labels.bincount())
    assert ((shares - 1 / 3).abs() < 0.01).all()
    assert abs(digits.train.mean()) < 1e-5
    assert abs(digits.train.std() - 1) < 1e-5
    seen = {image.numpy().tobytes() for image in digits.train}
    assert sum(image.numpy().tobytes() in seen for image in digits.test) == 0
    few = digits.first(100)
    assert len(few.train) == 100
    assert len(few.test) == 599
    assert len(few.train_labels.unique()) == 10


def test_files_that_are_missing_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(image_data.MissingData, match="apt-get install dataset-fashion-mnist"):
        image_data.load("fashion-mnist", tmp_path)
    with pytest.raises(SystemExit):
        bench_activation.main(["--train", "--data", "fashion-mnist", "--path", str(tmp_path)])
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err


def write_idx(path: Path, array: np.ndarray) -> None:
    heading = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(heading + array.astype(np.uint8).tobytes()))


def test_files_of_images_are_read(tmp_path: Path):
    images = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.array([0, 2, 1]))
    data = image_data.load("fashion-mnist", tmp_path)
    values = torch.from_numpy(images).float()
    torch.testing.assert_close(data.train[:, 0], (values - values.mean()) / values.std())
    assert data.test_labels.tolist() == [0, 2, 1]
    bad = tmp_path / "bad.gz"
    bad.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + (5).to_bytes(4, "big") + b"1234"))
    with pytest.raises(ValueError, match="holds 4 bytes, its heading says 5"):
        image_data.read_idx(bad)
    bad.write_bytes(gzip.compress(b"\x89PNG"))
    with pytest.raises(ValueError, match="no IDX file"):
        image_data.read_idx(bad)


@pytest.mark.parametrize("entry", train_activation.SURVEY, ids=lambda entry: entry.display)
def test_ours_and_plain_torch_are_the_same_net(entry: train_activation.Entry, digits: image_data.Images):
    """Value, and gradients of input and convolutions, of the nets whose times are compared."""
    nets = []
    for make in (entry.make, entry.plain):
        torch.manual_seed(0)
        nets.append(train_activation.network(make, 10, False).double())
    x = digits.test[:16].double()
    results = []
    for net in nets:
        y = net(x)
        y.square().sum().backward()
        results.append(
            (y.detach(), [layer.weight.grad for layer in net if isinstance(layer, torch.nn.Conv2d)])
        )
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    learned = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert learned[0] == learned[1]


def test_training_repeats_and_learns(digits: image_data.Images):
    torch.set_num_threads(1)
    few = digits.first(300)
    tanh = next(entry for entry in train_activation.SURVEY if entry.name == "tanh")
    protocol = train_activation.Protocol(epochs=4)
    assert protocol.milestone == 3
    first, second, other = (train_activation.train(tanh, few, protocol, seed) for seed in (0, 0, 1))
    assert first.test_accuracy > 0.5
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)
    assert other.train_loss != first.train_loss


def test_trained_rows_and_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("sklearn")
    command = ["--train", "--quick", "--only", "ReLU,swish_beta", "--threads", "1", "--out", str(tmp_path)]
    assert bench_activation.main(command) == 0
    rows = harness.read(tmp_path / "activation_train.csv", train_activation.Trained)
    assert [(r.activation, r.parameters, r.seed, r.mode) for r in rows] == [
        ("ReLU", "", 0, "quick"),
        ("Swish", "b=0.25", 0, "quick"),
    ]
    assert all(0 <= r.test_accuracy <= 1 and r.seconds > 0 and r.test_images == 599 for r in rows)
    times = harness.read(tmp_path / "activation_train_time.csv")
    assert {(r.case, r.base) for r in times} == {
        ("torchlin", "torch, ReLU"),
        ("torch", "torch, ReLU"),
        ("torch", "torchlin"),
    }
    assert {r.unit for r in times} == {"epoch"}
    out = capsys.readouterr().out
    assert "test accuracy, %" in out
    assert report.trained(tmp_path) == []  # a quick run is reported nowhere
    harness.append(
        tmp_path / "activation_train.csv",
        [
            dataclasses.replace(r, mode="full", seed=seed, test_accuracy=r.seed + 0.5 + 0.1 * seed)
            for r in rows[:1]
            for seed in (0, 1)
        ],
        train_activation.Trained,
    )
    (text,) = report.trained(tmp_path)
    assert "2 seeds" in text
    assert "| ReLU | 55.00 ± 7.07 |" in text


def test_unknown_functions_are_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_activation.main(["--train", "--only", "relu,rellu"])
    assert "rellu is none of the 18; they are Sigmoid, Tanh" in capsys.readouterr().err
