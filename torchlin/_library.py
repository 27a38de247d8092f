"""Finds and loads the compiled libraries, and knows why one is missing.

A missing or broken library never breaks `import torchlin`: its ops run their pure-torch reference, with one warning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
_OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class LibraryStatus:
    """One compiled library: whether it is loaded, from where, and why not."""

    loaded: bool
    path: Path | None
    reason: str = ""


def _load(stem: str) -> LibraryStatus:
    path = next(iter(sorted(_FOLDER.glob(f"{stem}*.so"))), None)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return LibraryStatus(False, path, f"torch {torch.__version__} is older than 2.11")
    if path is None:
        return LibraryStatus(False, None, f"{stem} was not built into this installation")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return LibraryStatus(False, path, f"{path.name} does not load: {str(error).splitlines()[0]}")
    return LibraryStatus(True, path)


def _load_cuda(cpu: LibraryStatus) -> LibraryStatus:
    if torch.version.cuda is None:
        # Its symbols live in libtorch_cuda.so, which a CPU build of torch does not have.
        return LibraryStatus(False, None, "this torch is built without CUDA")
    if not cpu.loaded:
        return LibraryStatus(False, None, "the CPU library, which declares the ops, is not loaded")
    return _load("_cuda")


_CPU = _load("_C")
_CUDA = _load_cuda(_CPU)
_STATUS = {"cpu": _CPU, "cuda": _CUDA}
_KERNELS = {device for device, library in _STATUS.items() if library.loaded}
_warned: set[str] = set()


def status() -> dict[str, LibraryStatus]:
    """The CPU and CUDA libraries of this process, by device type."""
    return dict(_STATUS)


def ops() -> list[str]:
    """Names of the raw ops that the loaded libraries register, without the `torchlin::` prefix."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("torchlin::") for name in names if name.startswith("torchlin::")})


def has_kernel(device_type: str) -> bool:
    """Whether compiled kernels serve this device; warns once where they should and do not."""
    if device_type in _KERNELS:
        return True
    missing = _STATUS.get(device_type)
    # A traced graph cannot warn; the first eager call does.
    if missing is not None and device_type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device_type)
        warnings.warn(
            f"torchlin's {device_type.upper()} kernels are not available ({missing.reason}): its ops run their slower "
            "pure-torch reference on this device. `torchlin info` says more.",
            RuntimeWarning,
            stacklevel=3,
        )
    return False
