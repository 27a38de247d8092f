"""What every family's benchmark program has: its options, its sections, and the inputs they share."""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlin import _library
from torchlin._console import progress, table
from torchlin.benchmarks.harness import TABLE_COLUMNS, Row, Session, line

KIB, MIB = 1 << 10, 1 << 20
OURS = "torchlin"

Sections = Mapping[str, Callable[[], None]]


def power_name(n: int) -> str:
    """2^k for a power of two, else the number itself."""
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


def binary(n: int) -> str:
    """A count with its binary prefix, where it is a whole number: 64K, 16M."""
    for unit, letter in ((MIB, "M"), (KIB, "K")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{letter}"
    return str(n)


def bytes_of(total: int) -> str:
    """In MiB or KiB."""
    return f"{total // MIB} MiB" if total >= MIB else f"{total // KIB} KiB"


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The same normal numbers for the same shape."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


@functools.cache
def _compiler_has_vectors() -> bool:
    """Whether torch.compile's C++ is made of vector instructions.

    It tries them out in a process of its own. Where that fails, for a file on sys.path with the name of a module for
    one, it writes scalar code and says nothing.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return bool(pick_vec_isa())


def compiled(function: Callable[..., Tensor], *example: Any) -> Callable[..., Tensor] | None:
    """torch.compile of a function, tried out; None where it does not work as well as it could here."""
    try:
        if not _compiler_has_vectors():
            raise RuntimeError("it finds no vector instructions that work here")
        torch._inductor.config.force_disable_caches = (
            True  # its cache gives out scalar code of such a process too
        )
        torch._dynamo.reset()  # a recompilation limit is shared by all sizes otherwise
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        with warnings.catch_warnings():  # of what else the cache's absence disables
            warnings.simplefilter("ignore")
            fast(*example)
    except Exception as error:
        print(f"torch.compile is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return fast


def print_rows(title: str, session: Session, rows: Sequence[Row]) -> None:
    """Rows as a person reads them."""
    table(f"{title}\n{session.heading}", TABLE_COLUMNS, [line(row) for row in rows])


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


_counts.__name__ = "thread counts"  # what argparse calls it in its message


@dataclass(frozen=True)
class Program:
    """The command line of one family: `torchlin bench <family>`.

    `sections` are what can be measured in a session, by the names that --only takes; `options` adds the
    family's own arguments, and `unusual` tells from them whether the run leaves out or changes something.
    """

    family: str
    title: str
    description: str
    sections: Callable[[Session, argparse.Namespace], Sections]
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    unusual: Callable[[argparse.Namespace], bool] = lambda args: False
    choose: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows  # what of it is printed
    threads: str = "1"

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=f"torchlin bench {self.family}", description=self.description.splitlines()[0]
        )
        parser.add_argument(
            "--quick",
            action="store_true",
            help="small sizes and few repeats: does it run, not how fast is it",
        )
        parser.add_argument("--only", default="", metavar="A,B", help="sections to run")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument(
            "--threads", type=_counts, default=self.threads, metavar="1,2", help=f"({self.threads})"
        )
        parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
        parser.add_argument("--out", type=Path, help="folder of the results file")
        self.options(parser)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs the benchmark and prints its table; returns the process's exit status."""
        parser = self._parser()
        args = parser.parse_args(argv)
        if not _library.has_kernel(args.device):
            reason = _library.status()[args.device].reason
            print(f"no {args.device} kernels to measure: {reason}", file=sys.stderr)
            return 1
        partial = bool(args.only) or self.unusual(args)
        threads = torch.get_num_threads()
        sessions = []
        try:
            for count in args.threads:
                torch.set_num_threads(count)
                session = Session(self.family, args.out, args.quick, count, args.device, partial)
                every = self.sections(session, args)
                wanted = args.only.split(",") if args.only else list(every)
                if unknown := set(wanted) - set(every):
                    parser.error(
                        f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(every)}"
                    )
                with session.stream(), progress(len(wanted), "measuring") as bar:
                    for name in wanted:
                        every[name]()
                        bar.advance(description=name)
                sessions.append(session)
        finally:
            torch.set_num_threads(threads)
        for session in sessions:
            print_rows(self.title, session, self.choose(session.rows))
        print(f"rows appended to {sessions[0].file}")
        return 0
