"""The `torchlin` command: every subcommand, what it prints, what it refuses, its exit status."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import torchlin
from torchlin import cli, registry

ROOT = Path(torchlin.__file__).resolve().parent


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = cli.main(argv)
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True)
def _names(own_registry: None) -> None:
    registry.register("activation", "test_both", dict)
    registry.register("loss", "test_both", list, aliases=("test_alias",))


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("--help", capsys=capsys)
    assert status == 0
    commands = [line.split()[0] for line in out.splitlines() if line.startswith("    ")]
    assert {"info", "list", "show", "bench", "demo"} <= set(commands)


def test_the_command_line_itself_needs_no_torch() -> None:
    # `import torchlin` brings torch in, to register the ops; cli.py adds nothing. Hence a bare package here.
    code = f"""
import sys, types
package = types.ModuleType("torchlin")
package.__path__ = [{str(ROOT)!r}]
sys.modules["torchlin"] = package
from torchlin.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules and "rich" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: torchlin")


def test_python_m_and_a_pipe_that_nobody_reads() -> None:
    command = [sys.executable, "-m", "torchlin", "list", "transform"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "hadamard" in done.stdout
    for unread in (command, [sys.executable, "-m", "torchlin", "show", "mish"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(unread, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, "")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("info", capsys=capsys)
    assert status == 0
    assert "hadamard_transform" in out
    status, out, _ = run("info", "--json", capsys=capsys)
    assert status == 0
    assert json.loads(out)["versions"]["torchlin"] == torchlin.__version__


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("list", capsys=capsys)
    rows = [line.split()[:2] for line in out.splitlines()[2:]]
    assert status == 0
    assert [row for row in rows if row[1] == "test_both"] == [
        ["activation", "test_both"],
        ["loss", "test_both"],
    ]
    assert ["transform", "hadamard"] in rows
    status, out, _ = run("list", "loss", "TEST-A*", capsys=capsys)
    assert [line.split()[:3] for line in out.splitlines()[2:]] == [["loss", "test_both", "test_alias"]]
    status, out, _ = run("list", "*hadamard", capsys=capsys)  # a pattern without a kind
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["transform"]


def test_list_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "norm", "zz*", capsys=capsys) == (1, "", "torchlin: no norm matches 'zz*'\n")
    assert run("list", "zz*", capsys=capsys) == (1, "", "torchlin: no name matches 'zz*'\n")
    status, _, err = run("list", "transfrom", capsys=capsys)
    assert (status, err.split(" is ")[0]) == (2, "torchlin: kind: 'transfrom'")


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("show", "Walsh-Hadamard", capsys=capsys)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("hadamard(n: int, *, block_size: int | None = None")
    assert lines[0].endswith("[transform]")
    assert lines[1:4] == [
        "also: walsh_hadamard",
        f"from: torchlin.nn.hadamard.HadamardTransform (torchlin {torchlin.__version__})",
        "make: torchlin.create('transform', 'hadamard', ...)",
    ]
    assert torchlin.nn.HadamardTransform.__doc__.splitlines()[0] in lines
    assert run("show", "transform", "hadamard", capsys=capsys)[1] == out
    _, both, _ = run("show", "test_both", capsys=capsys)
    assert "[activation]" in both
    assert "[loss]" in both


def test_show_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run("show", "hadamrd", capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith("torchlin: name: 'hadamrd' is registered in no kind; the closest: 'hadamard'")
    status, _, err = run("show", "norm", "hadamard", capsys=capsys)
    assert status == 2
    assert "it is a registered transform" in err


def test_bench_forwards_all_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    family = types.ModuleType("bench_hadamard")
    family.main = lambda argv: calls.append(argv) or 3
    monkeypatch.setitem(sys.modules, "torchlin.benchmarks.bench_hadamard", family)
    assert run("bench", "hadamard", "--quick", "--help", capsys=capsys)[0] == 3
    assert calls == [["--quick", "--help"]]


def test_bench_without_a_family_runs_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchlin.benchmarks as benchmarks

    calls = []
    for found in Path(benchmarks.__path__[0]).glob("bench_*.py"):
        fake = types.ModuleType(found.stem)
        fake.main = lambda argv, name=found.stem: calls.append((name, argv))
        monkeypatch.setitem(sys.modules, f"torchlin.benchmarks.{found.stem}", fake)
    assert run("bench", "--quick", capsys=capsys)[0] == 0
    assert ("bench_hadamard", ["--quick"]) in calls
    status, out, _ = run("bench", "--help", capsys=capsys)
    assert status == 0
    assert "families: " in out
    assert "hadamard" in out


def test_bench_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("bench", "hadamrd", capsys=capsys)
    assert (status, err) == (2, "torchlin: bench: 'hadamrd' is no family; did you mean hadamard\n")


def test_demo_forwards_its_stops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    fake = types.ModuleType("torchlin.demo")
    fake.main = lambda argv: calls.append(argv)
    monkeypatch.setitem(sys.modules, "torchlin.demo", fake)
    assert run("demo", "rotate", "--help", capsys=capsys)[0] == 0
    assert calls == [["rotate", "--help"]]


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_missing_package_says_how_to_get_it(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert run(command, capsys=capsys) == (
        2,
        "",
        f"torchlin: {command} needs scipy: pip install 'torchlin[{command}]'\n",
    )
