"""Tables and progress for people: `rich` on a terminal, plain lines in a pipe or where `rich` is missing."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, Generic, TextIO, TypeVar, overload

T = TypeVar("T")

# Work that ends sooner than this leaves no trace: a bar that flashes by tells nobody anything.
PATIENCE_S = 2.0


def _rich_on(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can show colours, and `rich` is installed."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        import rich.console  # noqa: F401
    except ImportError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- tables


def _is_figure(text: str) -> bool:
    return text in ("", "-") or re.match(r"[-+<>≤≥~]?\s?\d", text) is not None


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table to stdout; columns that hold only figures are aligned to the right.

    Cells are shown as `str(cell)` (None as an empty cell): the caller decides how many digits a number has.

    Example:
        >>> table("time", ["n", "us"], [[256, "0.05"], [16384, "4.10"]])
        time
            n    us
        -----  ----
          256  0.05
        16384  4.10
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"rows: every row needs {len(columns)} cells ({', '.join(columns)}), got {row}")
    right = [bool(cells) and all(_is_figure(row[i]) for row in cells) for i in range(len(columns))]
    if _rich_on(sys.stdout):
        _rich_table(title, columns, cells, right)
    else:
        _plain_table(title, columns, cells, right)


def _plain_table(title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    if title:
        print(title)
    for line in lines:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        print("  ".join(padded).rstrip())


def _rich_table(title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for name, is_right in zip(columns, right, strict=True):
        shown.add_column(Text(name), justify="right" if is_right else "left", overflow="fold")
    for row in cells:  # Text: a cell such as "[C, N]" is not markup
        shown.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(shown)


# -------------------------------------------------------------------------------------------------- progress


class Progress(Generic[T]):
    """What `progress` returns: iterate over it, or use it in a `with` block and call `advance`."""

    def __init__(self, work: Iterable[T] | None, total: int | None, description: str) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self._work = work
        self._started = self._last_line = 0.0
        self._bar: _Bar | None = None
        self._spoke = False

    def __iter__(self) -> Iterator[T]:
        if self._work is None:
            raise TypeError("progress(total, ...) counts steps: use it in a `with` block and call advance()")
        with self:
            for item in self._work:
                yield item
                self.advance()

    def __enter__(self) -> Progress[T]:
        self._started = self._last_line = time.monotonic()
        if _rich_on(sys.stderr):
            self._bar = _Bar(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elapsed = time.monotonic() - self._started
        if elapsed >= PATIENCE_S or self._spoke:
            how = "done in" if error[0] is None else "stopped after"
            print(f"{self._state()}, {how} {elapsed:.1f} s", file=sys.stderr, flush=True)

    def advance(self, steps: int = 1, description: str | None = None) -> None:
        """Counts `steps` more as done, and renames what is being done where `description` is given."""
        self.done += steps
        self.description = self.description if description is None else description
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        elif now - self._last_line >= PATIENCE_S and self.done != self.total:
            self._last_line, self._spoke = now, True
            print(f"{self._state()} ({now - self._started:.0f} s)", file=sys.stderr, flush=True)

    def _state(self) -> str:
        of = "" if self.total is None else f"/{self.total}"
        return f"{self.description}: {self.done}{of}"


@overload
def progress(work: int, description: str) -> Progress[None]: ...
@overload
def progress(work: Iterable[T], description: str) -> Progress[T]: ...
def progress(work: Iterable[T] | int, description: str) -> Progress[T] | Progress[None]:
    """Shows on stderr how far a loop is, once it has lasted two seconds: a bar on a terminal, else lines.

    `work` is either what to iterate over or the number of steps that `advance()` will count.

    Example:
        >>> sum(progress(range(4), "adding"))
        6
        >>> with progress(10, "copying") as bar:
        ...     bar.advance(5)
    """
    if isinstance(work, int):
        return Progress(None, work, description)
    return Progress(work, len(work) if isinstance(work, Sized) else None, description)


class _Bar:
    """One line of a display that all bars share, because a terminal can hold one live display at a time."""

    _lock = threading.RLock()
    _display: Any = None
    _shown = 0

    def __init__(self, of: Progress[Any]) -> None:
        self._of = of
        self._task: Any = None
        # A timer, not a look at the clock in advance(): one long step must show a bar too.
        self._timer = threading.Timer(PATIENCE_S, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        from rich import progress as rp
        from rich.console import Console

        with _Bar._lock:
            if self._timer is None:  # closed meanwhile
                return
            if _Bar._display is None:
                columns = (
                    rp.TextColumn("{task.description}", markup=False),
                    rp.BarColumn(),
                    rp.MofNCompleteColumn(),
                    rp.TimeElapsedColumn(),
                    rp.TimeRemainingColumn(),
                )
                _Bar._display = rp.Progress(*columns, console=Console(stderr=True), transient=True)
                _Bar._display.start()
            _Bar._shown += 1
            self._task = _Bar._display.add_task(
                self._of.description, total=self._of.total, completed=self._of.done
            )
            # Rich counts from here; the work began PATIENCE_S earlier, by the same clock.
            next(t for t in _Bar._display.tasks if t.id == self._task).start_time = self._of._started

    def update(self) -> None:
        if self._task is not None:
            _Bar._display.update(self._task, completed=self._of.done, description=self._of.description)

    def close(self) -> None:
        with _Bar._lock:
            self._timer.cancel()
            self._timer = None  # type: ignore[assignment]
            if self._task is None:
                return
            _Bar._display.remove_task(self._task)
            self._task = None
            _Bar._shown -= 1
            if _Bar._shown == 0:
                _Bar._display.stop()
                _Bar._display = None
