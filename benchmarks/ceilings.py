"""What the machine can do at most, measured in the same run: clock, additions, FMAs, copies."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlin.benchmarks.harness import Case, Relation, Session

_raw = torch.ops.torchlin

SPIN = 1 << 20  # iterations of a call: some 300 us, of which the call itself is less than 1 %


def cycles(floats_per_cycle: float = 1.0, name: str = "one cycle") -> Case:
    """A chain of dependent integer additions, one a cycle on every CPU: the clock, whatever it is by then.

    `floats_per_cycle` turns it into an arithmetic floor whose unit is an element.
    """
    return Case(name, lambda: _raw._bench_cycles(SPIN), per=SPIN * floats_per_cycle, alloc="")


def arithmetic(operation: str) -> Case:
    """Independent vector operations ("add" or "fma") at the CPU level in use, per float."""
    floats = 16 * SPIN
    return Case(operation, lambda: _raw._bench_arithmetic(floats, operation), per=floats, alloc="")


def copy(source: Tensor, target: Tensor, times: int = 1) -> Case:
    """memcpy of one contiguous tensor into another, per element."""
    per = source.numel() * times
    return Case("memcpy", lambda: _raw._bench_copy(target, source, times), per=per, alloc="out=")


def rows(session: Session) -> None:
    """Arithmetic and copies per clock cycle, at the vector width of the instruction set in use."""
    clock = cycles()
    session.compare(
        "ceilings: floats a cycle",
        [clock, arithmetic("add"), arithmetic("fma")],
        [Relation(clock.name, "add"), Relation(clock.name, "fma")],
        size="",
        shape=(),
        dtype=torch.float32,
        unit="cycle",
    )
    for size, total in {"16 KiB": 1 << 14, "256 KiB": 1 << 18, "64 MiB": 1 << 26}.items():
        if session.quick and total > 1 << 20:
            continue
        source, target = torch.zeros(2, total, dtype=torch.uint8)
        times = max(1, 4 * SPIN // total)  # one copy of a small tensor would be shorter than the call
        session.compare(
            "ceilings: bytes copied a cycle",
            [clock, copy(source, target, times)],
            [Relation(clock.name, "memcpy")],
            size=size,
            shape=(total,),
            dtype=torch.uint8,
            unit="cycle",
        )
