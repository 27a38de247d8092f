"""Tables and progress: plain lines in a pipe, `rich` on a terminal, nothing for short work."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time

import pytest

from torchlin import _console
from torchlin._console import progress, table


def test_a_plain_table_aligns_figures_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    table("time", ("op", "us", "note"), [("hadamard", "4.10", None), ("x[0]", "12×", "in cache")])
    assert capsys.readouterr().out == (
        "time\n"
        "op          us  note\n"
        "--------  ----  --------\n"
        "hadamard  4.10\n"
        "x[0]       12×  in cache\n"
    )  # fmt: skip


def test_a_table_without_rows_shows_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    table("", ("op", "us"), [])
    assert capsys.readouterr().out == "op  us\n--  --\n"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every row needs 2 cells \(op, us\), got \['x'\]"):
        table("", ("op", "us"), [("x",)])


def test_short_work_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("abc", "letters")) == ["a", "b", "c"]
    with progress(10, "steps") as bar:
        bar.advance(10)
    assert bar.done == 10
    assert capsys.readouterr() == ("", "")


def test_long_work_tells_by_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for _ in progress(range(6), "layers"):
        clock[0] += 1.5
    assert capsys.readouterr().err == "layers: 2/6 (3 s)\nlayers: 4/6 (6 s)\nlayers: 6/6, done in 9.0 s\n"
    for _ in progress(iter(range(3)), "unknown length"):
        clock[0] += 2.5
    assert capsys.readouterr().err.splitlines()[-1] == "unknown length: 3, done in 7.5 s"


def test_an_error_says_how_far_it_got(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def fail() -> None:
        with progress(4, "layers") as bar:
            clock[0] += 3
            bar.advance(description="norms")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert capsys.readouterr().err == "norms: 1/4 (3 s)\nnorms: 1/4, stopped after 3.0 s\n"


def test_steps_can_not_be_iterated() -> None:
    with pytest.raises(TypeError, match="use it in a `with` block"):
        list(progress(3, "steps"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rich_is_for_terminals_and_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    assert _console._rich_on(Terminal())
    assert not _console._rich_on(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not _console._rich_on(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "rich.console", None)  # import raises ImportError
    assert not _console._rich_on(Terminal())


def test_on_a_terminal_a_bar_appears_and_goes() -> None:
    pytest.importorskip("rich")
    pty = pytest.importorskip("pty")
    code = """
import time
from torchlin import _console
_console.PATIENCE_S = 0.3
_console.table("shapes", ["op", "shape"], [["[bold]not markup[/bold]", "[3, 4]"]])
for _ in _console.progress(range(2), "outer"):
    for _ in _console.progress(range(2), "inner"):
        time.sleep(0.3)
assert _console._Bar._display is None and _console._Bar._shown == 0
"""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment
    ) as child:
        os.close(theirs)
        read = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the child has closed its end
                break
            if not part:
                break
            read += part
    os.close(ours)
    text = read.decode()
    assert child.returncode == 0, text
    assert "[bold]not markup[/bold]" in text
    assert "[3, 4]" in text
    assert "━" in text  # a bar was drawn
    assert "inner: 2/2, done in" in text
    assert "outer: 2/2, done in" in text
