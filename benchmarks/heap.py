"""How glibc's malloc treats large blocks, which decides whether a fresh output costs page faults."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_INT_MAX = 2**31 - 1


@contextlib.contextmanager
def kept(reserve: int) -> Iterator[bool]:
    """Inside, freed memory stays with the process, and `reserve` bytes of it are there from the start.

    So a fresh output costs no page faults, as with a caching allocator. Yields False where the C library is
    not glibc, and nothing changes. Afterwards malloc behaves as in a process that has freed a large block
    before: its thresholds, which follow the largest one, are at their upper end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield False
        return
    ok = mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _INT_MAX)
    try:
        torch.full((reserve,), 1, dtype=torch.uint8)  # written to, then freed
        yield bool(ok)
    finally:
        mallopt(_MMAP_MAX, 65536)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
        ctypes.CDLL(None).malloc_trim(0)
