"""Kernels that are compiled while a program runs: by the C++ compiler for the CPU, by NVRTC for CUDA."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from torchlin import _compile, _library, _nvrtc
from torchlin._compile import CompileError
from torchlin.catalogue.cpp_code import shard
from torchlin.catalogue.formula import REDUCTIONS, Call, written_out
from torchlin.catalogue.kernels import Kernel, devices, loaded, with_id
from torchlin.ops.activation_forms import traced_constant

_raw: Any = torch.ops.torchlin

# What a compiler takes some seven seconds for; the largest formula of the catalogue has 40 operations, most have ten.
_MOST_OPERATIONS = 500
_LONGEST = 20_000  # operations where nothing is shared: the source has the formula in a comment
_MOST_VARIABLES = 31  # which of them a derivative is by is said by the bits of one number

_CPU_SOURCE = """\
#include "activation/kernel.h"
#define TORCHLIN_SHARD_FILE "functor.inc"
#define TORCHLIN_KERNEL "activation/kernel_cpu.h"
#include "simd/foreach_isa.h"
TORCHLIN_ACTIVATION_LIBRARY
"""
_CUDA_SOURCE = """\
#include "activation/kernel.cuh"
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(kThreads) torchlin_##name
namespace torchlin::activation {
#include "functor.inc"
KERNEL(forward)(const __grid_constant__ Arguments a) { run<K_NAME, false>(a); }
KERNEL(backward)(const __grid_constant__ Arguments a) { run<K_NAME, true>(a); }
#if SLOTS
KERNEL(backward_slots)(const __grid_constant__ SumArguments s) { run_with_sums<K_NAME>(s); }
#endif
}
"""


def load(kernel: Kernel) -> None:
    """Compiles a kernel for the CPU, or finds it in the cache, and hands it to the compiled library, which may have it.

    Raises:
        CompileError: why that cannot be.
    """
    if "_activation_load" not in _library.ops():
        raise CompileError(_library.status()["cpu"].reason or "torchlin's CPU library has no activations")
    if "cpu" in devices(kernel):
        return
    _check(kernel)
    _check_build()
    path = compiled(kernel)
    try:
        ids = _raw._activation_load(str(path))
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        raise CompileError(f"{path} does not load: {error}") from error
    assert list(ids) == [kernel.id], ids
    loaded(kernel, "cpu")


def compiled(kernel: Kernel) -> Path:
    """The shared library of a kernel."""
    return _compile.shared_library(kernel.name, {"kernel.cpp": _CPU_SOURCE, "functor.inc": shard([kernel])})


def _check(kernel: Kernel) -> None:
    parts = list(kernel.body.walk())
    sums = sum(isinstance(part, Call) and part.op in REDUCTIONS for part in parts)
    for count, what, most in (
        (len(parts), "operations", _MOST_OPERATIONS),
        (written_out(kernel.body), "operations where nothing is shared", _LONGEST),
        (
            len(kernel.inputs) + len(kernel.vector_slots) + sums,
            "inputs, parameters and sums",
            _MOST_VARIABLES,
        ),
    ):
        if count > most:
            raise CompileError(f"the formula has {count} {what}, more than {most}")


def _check_build() -> None:
    """In a source tree headers can be newer than the library, and then the two may not agree on what they hand over."""
    folder, library = _compile.headers(), _library.status()["cpu"].path
    if library is None or library.parent in folder.parents:  # of an installed package: made together
        return
    built = library.stat().st_mtime
    for pattern in ("activation/kernel*.h", "activation/reductions.h", "simd/*.h"):
        for header in folder.glob(pattern):
            if header.stat().st_mtime > built:
                raise CompileError(f"{header} is newer than {library.name}: build it first")


# -------------------------------------------------------------------------------------------------------------- CUDA


@traced_constant
def load_late(id: int, device: str) -> bool:
    """Compiles a kernel for CUDA when it is first needed there, since asking for a GPU's kind makes torch take hold of it.

    Returns:
        Whether the device has the kernel now; why not is said in a warning, once.
    """
    if device != "cuda" or "_activation_load_cuda" not in _library.ops():
        return False
    try:
        kernel = with_id(id)
    except KeyError:  # not to be compiled
        return False
    try:
        _check(kernel)
        parts = torch.frombuffer(bytearray(_code(kernel, _architecture())), dtype=torch.uint8)
        vectors = sum(1 << i for i, vector in enumerate(kernel.vector_slots) if vector)
        _raw._activation_load_cuda(parts, id, len(kernel.inputs), len(kernel.vector_slots), vectors)
    except (CompileError, RuntimeError) as error:
        message = f"{kernel.name} runs its slower pure-torch reference on CUDA: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    loaded(kernel, "cuda")
    return True


def _architecture() -> str:
    """Machine code where it runs on every GPU of this process, else PTX."""
    known = sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    (low, minor), (high, _) = known[0], known[-1]
    return f"{'sm' if low == high else 'compute'}_{low}{minor}"


def _code(kernel: Kernel, architecture: str) -> bytes:
    """Machine code or PTX of a kernel, from the cache where that has it."""
    source = _CUDA_SOURCE.replace("K_NAME", f"K_{kernel.name}").replace(
        "SLOTS", str(len(kernel.vector_slots))
    )
    files = {"kernel.cu": source, "functor.inc": shard([kernel])}
    options = [f"-I{_compile.headers()}"]
    suffix = ".cubin" if architecture.startswith("sm_") else ".ptx"
    parts = (architecture, *files.values(), _compile.headers_text(), _nvrtc.version())
    path = _compile.cached(kernel.name, suffix, parts, lambda _: _nvrtc.compile(files, options, architecture))
    code = _compile.content(path)
    assert code is not None
    return code
