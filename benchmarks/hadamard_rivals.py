"""What the Hadamard transform is measured against: the best forms in plain torch, and packages from PyPI.

All are unnormalised (scale 1): a form in plain torch would pay another pass for the scale, ours does not.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchlin.benchmarks.harness import Case
from torchlin.ops.hadamard_matrix import hadamard_matrix


def _factors(n: int, count: int) -> list[int]:
    """Powers of two, as equal as they come, whose product is n."""
    log = n.bit_length() - 1
    return [1 << (log * (i + 1) // count - log * i // count) for i in range(count)]


def kronecker(x: Tensor, gemms: int) -> Case:
    """H_n = H_a ⊗ H_b (⊗ H_c): one GEMM a factor, each into a buffer that is there already."""
    rows, n = x.shape
    buffers = [torch.empty_like(x), torch.empty_like(x)]
    stages: list[tuple[Tensor, Tensor, Tensor]] = []
    source, inner = x, n
    for i, factor in enumerate(_factors(n, gemms)):
        h = hadamard_matrix(factor, dtype=x.dtype, device=x.device)
        inner //= factor
        target = buffers[i % 2]
        if inner == 1:  # the last factor is the fast index: one large GEMM
            stages.append((source.view(-1, factor), h, target.view(-1, factor)))
        else:
            outer = rows * n // (factor * inner)
            shape = (outer, factor, inner)
            stages.append((h.expand(outer, factor, factor), source.view(shape), target.view(shape)))
        source = target

    def run() -> Tensor:
        for left, right, out in stages:
            torch.matmul(left, right, out=out) if left.dim() == 2 else torch.bmm(left, right, out=out)
        return source

    return Case(f"{gemms} GEMMs", run, alloc="out=", result=run)


def butterfly(x: Tensor) -> Case:
    """log2 n stages of torch.add and torch.sub between two buffers."""
    n = x.shape[-1]
    buffers = [torch.empty_like(x), torch.empty_like(x)]
    stages: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    source, half, turn = x, 1, 0
    while half < n:
        a, b = source.view(-1, n // (2 * half), 2, half).unbind(-2)
        target = buffers[turn % 2]
        low, high = target.view(-1, n // (2 * half), 2, half).unbind(-2)
        stages.append((a, b, low, high))
        source, half, turn = target, 2 * half, turn + 1

    def run() -> Tensor:
        for a, b, low, high in stages:
            torch.add(a, b, out=low)
            torch.sub(a, b, out=high)
        return source

    return Case("butterfly", run, alloc="out=", result=run)


def dense(x: Tensor) -> Case:
    """x @ H, the matrix made beforehand."""
    h = hadamard_matrix(x.shape[-1], dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)

    def run() -> Tensor:
        return torch.matmul(x, h, out=out)

    return Case("x @ H", run, alloc="out=", result=run)


# ------------------------------------------------------------------------------------------------- packages


@dataclass(frozen=True)
class Peer:
    """A package from PyPI: what pip calls it, and how to make a case of it from a (rows, n) input."""

    name: str
    inplace: bool
    largest: int  # n up to which it is worth the wait
    make: Callable[[Tensor], Case]


def _numpy_inplace(name: str, transform: Callable[[np.ndarray], object]) -> Callable[[Tensor], Case]:
    def make(x: Tensor) -> Case:
        # Unnormalised and in place, call after call, overflows: zeros stay zeros, by the same instructions.
        buffer = torch.zeros_like(x).numpy()

        def result() -> Tensor:
            y = x.clone()
            transform(y.numpy())
            return y

        return Case(name, lambda: transform(buffer), alloc="in place", result=result)

    return make


def _torch_fresh(name: str, transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Case]:
    return lambda x: Case(name, lambda: transform(x), result=lambda: transform(x))


def _fht_cpu() -> Peer:
    fht = importlib.import_module("fht_cpu").fht
    make = _numpy_inplace("fht-cpu", lambda y: fht(y, num_threads=1))
    return Peer("fht-cpu", True, 1 << 20, make)


def _ffht() -> Peer:
    fht_ = importlib.import_module("ffht").fht_
    return Peer("FFHT", True, 1 << 20, _numpy_inplace("FFHT", lambda y: fht_(y, 1)))


def _hadamard_transform() -> Peer:
    package = importlib.import_module("hadamard_transform").hadamard_transform

    def make(x: Tensor) -> Case:
        root = math.sqrt(x.shape[-1])  # orthonormal by itself: the factor is for the check alone
        return Case("hadamard-transform", lambda: package(x), alloc="fresh", result=lambda: package(x) * root)

    return Peer("hadamard-transform", False, 1 << 14, make)


@contextmanager
def _placeholder(name: str) -> Iterator[None]:
    """An empty module under `name` while a package is imported whose compiled part cannot be there."""
    mine = name not in sys.modules
    if mine:
        sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        if mine:
            del sys.modules[name]


def _dao_reference() -> Peer:
    path = "fast_hadamard_transform.fast_hadamard_transform_interface"
    try:
        interface = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != "fast_hadamard_transform_cuda":
            raise
        with _placeholder("fast_hadamard_transform_cuda"):
            interface = importlib.import_module(path)
        for name in [name for name in sys.modules if name.startswith("fast_hadamard_transform")]:
            del sys.modules[name]  # nobody else may take it for the working package
    name = "fast-hadamard-transform, its reference"
    return Peer(name, False, 1 << 12, _torch_fresh(name, interface.hadamard_transform_ref))


PEERS: dict[str, Callable[[], Peer]] = {
    "FFHT-unofficial": _ffht,
    "fht-cpu": _fht_cpu,
    "hadamard-transform": _hadamard_transform,
    "fast-hadamard-transform": _dao_reference,
}


def peers() -> tuple[list[Peer], dict[str, str]]:
    """The packages that import here, and why the others do not."""
    found, missing = [], {}
    for package, load in PEERS.items():
        try:
            found.append(load())
        except Exception as error:  # somebody else's compiled package may fail in any way
            missing[package] = f"{type(error).__name__}: {error}"
    return found, missing


def dao_kernel() -> Callable[[Tensor, float], Tensor] | None:
    """fast-hadamard-transform's CUDA function, where it is installed with its kernels."""
    try:
        return importlib.import_module("fast_hadamard_transform").hadamard_transform
    except Exception:
        return None
